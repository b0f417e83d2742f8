// Incremental reader of answers from /v1/completions or /v1/chat/completions, independent of the page.

/** The `data` of each event in a server-sent event stream of bytes. Comments (keep-alives) are dropped. */
export async function* eventData(chunks) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of chunks) {
    rest += decoder.decode(chunk, { stream: true });
    const events = rest.split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

/** Message of an error body or an error event; `status` if there is an HTTP status. */
export function errorText(body, status) {
  const message = body?.error?.message ?? "the server's answer is not readable";
  return status ? `${status}: ${message}` : message;
}

/** Request body for a prompt. */
export function requestBody({ kind, model, prompt, maxTokens, temperature }) {
  const asked = kind === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  return {
    model,
    ...asked,
    max_tokens: maxTokens,
    temperature,
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

/**
 * Send a prompt; call `onText(piece)` as the answer grows. Return `{finishReason, usage}`.
 * Throw an Error with the server's message, and an AbortError when `signal` aborts.
 */
export async function generate(prompt, { headers, signal, onText }) {
  const path = prompt.kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(requestBody(prompt)),
    signal,
  });
  if (!response.ok) {
    throw new Error(errorText(await response.json().catch(() => null), response.status));
  }
  let finishReason = null;
  let usage = null;
  for await (const data of eventData(pieces(response.body))) {
    if (data === "[DONE]") return { finishReason, usage };
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(errorText(chunk));
    const choice = chunk.choices[0];
    const text = choice?.text ?? choice?.delta?.content;
    if (text) onText(text);
    finishReason = choice?.finish_reason ?? finishReason;
    usage = chunk.usage ?? usage;
  }
  throw new Error("the connection ended before the answer did");
}
