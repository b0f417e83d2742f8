"""Prometheus metrics, under the names that dashboards of LLM servers know, with our prefix.

`sps2_mega.metrics` defines the durations. A renamed metric breaks
dashboards, so a test freezes the names.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from sps2_mega.outputs import RequestOutput

PREFIX = "sps2:"
# Seconds; a long prefill takes minutes.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_PER_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    5,
    20,
    80,
)
_TOTAL = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 7680)
_TOKENS = tuple(2.0**power for power in range(21))


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # a second series for each one, which no dashboard reads
        self._registry = CollectorRegistry()
        self._model_name = model_name
        labels = ["model_name"]

        def gauge(name: str, text: str) -> Gauge:
            metric = Gauge(PREFIX + name, text, labels, registry=self._registry)
            return metric.labels(model_name)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(PREFIX + name, text, labels + list(more), registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(
                PREFIX + name, text, labels, registry=self._registry, buckets=buckets
            )
            return metric.labels(model_name)

        self._running = gauge("num_requests_running", "Samples being prefilled or decoded.")
        self._waiting = gauge("num_requests_waiting", "Samples waiting in the queue.")
        self._kv_usage = gauge("kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.")
        self._rank_kv_usage = Gauge(
            PREFIX + "kv_cache_rank_usage_perc",
            "Used share of each SP rank's KV cache; side is all, prefill or decode.",
            [*labels, "side", "sp_rank"],
            registry=self._registry,
        )
        self._prompt = counter("prompt_tokens", "Prompt tokens computed.")
        self._cached = counter("prefix_cache_hits", "Prompt tokens found in the KV cache.")
        self._output = counter("generation_tokens", "Tokens generated.")
        self._success = counter("request_success", "Samples answered.", "finished_reason")
        self._errors = counter("request_error", "Requests whose generation failed.")
        self._aborted = counter("request_aborted", "Calls abandoned by their clients, or failed.")
        self._rejections = counter("admission_rejections", "Calls turned away.", "reason")
        self._http = counter("http_requests", "HTTP responses.", "path", "status")
        self._ttft = histogram("time_to_first_token_seconds", "TTFT, queue included.", _FIRST_TOKEN)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens.", _PER_TOKEN)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean gap of a sample.", _PER_TOKEN
        )
        self._total = histogram("e2e_request_latency_seconds", "Whole samples.", _TOTAL)
        self._queue = histogram("request_queue_time_seconds", "Before the first step.", _TOTAL)
        self._prompt_len = histogram("request_prompt_tokens", "Prompt lengths.", _TOKENS)
        self._output_len = histogram("request_generation_tokens", "Output lengths.", _TOKENS)
        self._last: Any = None

    def text(self) -> bytes:
        """Metrics in the exposition format."""
        return generate_latest(self._registry)

    def engine_stats(self, stats: Any) -> None:
        """Record a snapshot of the engine; its token counts are cumulative."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        for use in stats.kv_pools:
            for rank, used in enumerate(use.used_per_rank):
                gauge = self._rank_kv_usage.labels(self._model_name, use.pool, str(rank))
                gauge.set(used / max(1, use.blocks_per_rank))
        for counter, name in (
            (self._prompt, "prompt_tokens"),
            (self._cached, "cached_tokens"),
            (self._output, "output_tokens"),
        ):
            grown = getattr(stats, name) - getattr(self._last, name, 0)
            if grown:
                counter.labels(self._model_name).inc(grown)
        self._last = stats

    def finished(self, output: RequestOutput) -> None:
        if output.error is not None:
            self._errors.labels(self._model_name).inc()
        else:
            self._prompt_len.observe(len(output.prompt_token_ids))
        for completion in output.completions:
            reason, timings = completion.finish_reason.value, completion.timings
            self._success.labels(self._model_name, reason).inc()
            self._output_len.observe(len(completion.token_ids))
            self._ttft.observe(timings.ttft_s)
            self._queue.observe(timings.queue_s)
            self._total.observe(timings.total_s)
            for gap in timings.gaps_s:
                self._gap.observe(gap)
            if timings.per_token_s is not None:
                self._tpot.observe(timings.per_token_s)

    def aborted(self) -> None:
        self._aborted.labels(self._model_name).inc()

    def rejected(self, reason: str) -> None:
        self._rejections.labels(self._model_name, reason).inc()

    def responded(self, path: str, status: int) -> None:
        """Count an HTTP response; `path` must be one of few: every value becomes a series."""
        self._http.labels(self._model_name, path, str(status)).inc()
