// The page at /: show /status once a second, and send prompts typed by the reader.
import { errorText, generate } from "./event_stream.js";

const POLL_MS = 1000;
const GIB = 2 ** 30;
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

let key = "";
let model = "";
let before = null; // output tokens and time of the last look
let poll = null;

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function showError(id, text) {
  $(id).hidden = !text;
  show(id, text ?? "");
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${number.format(1000 * value)} ms` : `${number.format(value)} s`;
}

function rows(table, entries) {
  const body = table.tBodies[0];
  while (body.rows.length > entries.length) body.deleteRow(-1);
  entries.forEach((cells, index) => {
    const row = body.rows[index] ?? body.insertRow();
    cells.forEach((cell, column) => {
      (row.cells[column] ?? row.insertCell()).textContent = cell;
    });
  });
  table.hidden = entries.length === 0;
}

// Prefix like "decode " for values of one of two rank pools.
const ofSide = (name) => (name === "all" ? "" : `${name} `);

function showKv(cache) {
  const list = $("kv");
  const ranks = cache.sides.flatMap((side) =>
    side.used_per_rank.map((used, rank) => ({
      used,
      of: side.blocks_per_rank,
      name: `${ofSide(side.name)}SP rank ${rank}`,
    })),
  );
  if (list.children.length !== ranks.length) {
    list.replaceChildren(
      ...ranks.map(() => {
        const item = document.createElement("li");
        const label = document.createElement("label");
        label.append("", document.createElement("meter"), document.createElement("span"));
        item.append(label);
        return item;
      }),
    );
  }
  ranks.forEach(({ used, of, name }, index) => {
    const item = list.children[index];
    // The server may have restarted with other rank pools since the last look.
    item.firstChild.firstChild.textContent = name;
    item.querySelector("meter").max = of;
    const text = `${number.format(used)} of ${number.format(of)} blocks`;
    item.querySelector("meter").value = used;
    item.querySelector("meter").textContent = text;
    item.querySelector("span").textContent = text;
  });
}

function sideText({ name, tp, sp }) {
  return `${name === "all" ? "" : `${name} on `}TP ${tp}, SP ${sp}`;
}

function showLayout(layout, cache) {
  const levels = layout.sp_levels.join(" x ");
  show(
    "layout",
    `${layout.world_size} ${layout.world_size === 1 ? "rank" : "ranks"}: ${layout.sides.map(sideText).join("; ")}` +
      `${layout.sp_levels.length > 1 ? ` (levels ${levels})` : ""}, ${layout.device}, ${layout.dtype}, ` +
      `transport ${layout.transport}, context ${number.format(layout.max_model_len)} tokens, ` +
      `${cache.block_size} tokens per block`,
  );
  const rankSides = layout.sides.flatMap(({ name, tp, sp }) => Array(tp * sp).fill(name));
  const gib = (bytes) => (bytes / GIB).toFixed(2);
  rows(
    $("memory"),
    layout.memory.map((m, rank) => [
      `${ofSide(rankSides[rank])}${rank}`, gib(m.weights), gib(m.kv_cache), gib(m.activations), gib(m.free),
    ]),
  );
}

function showLoad(status) {
  const { load, latency } = status;
  show("running", number.format(load.running));
  show("waiting", number.format(load.waiting));
  show("ttft", `${seconds(latency.ttft.p50_s)} / ${seconds(latency.ttft.p99_s)}`);
  show("tbt", `${seconds(latency.tbt.p50_s)} / ${seconds(latency.tbt.p99_s)}`);
  show("prompt-tokens", `${number.format(load.prompt_tokens)} / ${number.format(load.cached_tokens)}`);
  const now = { tokens: load.output_tokens, at: performance.now() };
  if (before && now.at > before.at) {
    show("rate", number.format((1000 * (now.tokens - before.tokens)) / (now.at - before.at)));
  }
  before = now;
}

function showStatus(status) {
  model = status.model;
  show("model", status.model);
  document.title = `${status.model} · sps2_mega`;
  show("state", status.state);
  $("state").dataset.state = status.state;
  show("summary", status.stage ?? `for ${number.format(Math.round(status.uptime_s))} s`);
  show("version", `version ${status.version}`);
  showError("status-error", status.reason);
  showLoad(status);
  if (status.layout) {
    showLayout(status.layout, status.kv_cache);
    showKv(status.kv_cache);
  }
  $("no-requests").hidden = status.requests.length > 0;
  rows(
    $("requests"),
    status.requests.map((r) => [
      seconds(r.age_s),
      number.format(r.prompt_tokens),
      r.num_samples,
      r.output_tokens === null ? "not streamed" : number.format(r.output_tokens),
    ]),
  );
}

function showUnreachable(text) {
  show("state", "unreachable");
  $("state").dataset.state = "unreachable";
  show("summary", "");
  showError("status-error", text);
}

async function look() {
  clearTimeout(poll);
  try {
    const response = await fetch("status", { headers: headers(), cache: "no-store" });
    const body = await response.json().catch(() => null);
    $("key-form").hidden = response.status !== 401;
    if (response.ok) showStatus(body);
    else if (response.status === 401 && !key) {
      show("state", "locked");
      showError("status-error", null);
    } else showUnreachable(errorText(body, response.status));
  } catch {
    showUnreachable("the server does not answer");
  }
  // A page in the background needs no status.
  if (!document.hidden) poll = setTimeout(look, POLL_MS);
}

let running = null; // AbortController of the prompt under way

async function send() {
  if (running || !$("try").reportValidity()) return;
  const controller = new AbortController();
  running = controller;
  $("send").disabled = true;
  $("stop").disabled = false;
  showError("try-error", null);
  show("answer", "");
  show("answer-note", "waiting for the first token");
  const began = performance.now();
  let first = null;
  try {
    const { finishReason, usage } = await generate(
      {
        kind: $("try").elements.kind.value,
        model,
        prompt: $("prompt").value,
        maxTokens: $("max-tokens").valueAsNumber,
        temperature: $("temperature").valueAsNumber,
      },
      {
        headers: headers(),
        signal: controller.signal,
        onText(piece) {
          if (first === null) {
            first = performance.now();
            show("answer-note", "generating");
          }
          $("answer").append(piece);
        },
      },
    );
    const total = (performance.now() - began) / 1000;
    const wait = first === null ? "" : `, first text after ${seconds((first - began) / 1000)}`;
    show(
      "answer-note",
      `${usage.prompt_tokens} prompt tokens, ${usage.completion_tokens} generated, ` +
        `ended by ${finishReason}${wait}, ${seconds(total)} in all`,
    );
  } catch (error) {
    const stopped = error.name === "AbortError";
    show("answer-note", stopped ? "stopped" : "");
    if (!stopped) showError("try-error", error.message);
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    look();
  }
}

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  look();
});
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
