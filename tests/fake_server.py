"""The HTTP server over an engine without a model, in this process: real sockets, no ranks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
from fake_engine import FakeEngine

from sps2_mega.engine.startup.memory_table import RankMemory
from sps2_mega.engine.stats import KVUse
from sps2_mega.parallel.rank_pools import RankPool
from sps2_mega.serving.http.app import build_app
from sps2_mega.serving.http.async_engine import AsyncEngine, ServedFacts, ServedModel
from sps2_mega.serving.http.engine_loop import Stop, run_engine
from sps2_mega.serving.http.prometheus import ServerMetrics
from sps2_mega.serving.http.server import HttpServer, bind, url_of
from sps2_mega.serving.http.settings import ServerConfig

MODEL = "fake"
FACTS = ServedFacts(
    world_size=6,
    pools=(RankPool(name="all", first=0, tp=2, sp=3),),
    sp_levels=(3,),
    device="cpu",
    dtype="float32",
    transport="ring",
    max_model_len=64,
    block_size=16,
    kv_pools=(KVUse(pool="all", blocks_per_rank=10, used_per_rank=(0, 0, 0)),),
    memory=tuple(
        RankMemory(weights=2**30, kv_cache=2**29, activations=2**28, free=rank * 2**30)
        for rank in range(6)
    ),
)


@dataclass
class FakeServer:
    engine: FakeEngine
    async_engine: AsyncEngine
    http: HttpServer
    url: str
    engine_thread: threading.Thread

    def client(self, **options: object) -> openai.OpenAI:
        defaults = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return openai.OpenAI(**{**defaults, **options})

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=30, **options)

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"sps2:{name}{{"))


@contextlib.contextmanager
def serving(
    engine: FakeEngine, *, max_samples: int = 16, ready: bool = True, **settings: object
) -> Iterator[FakeServer]:
    config = ServerConfig(**{"port": 0, "request_timeout": 30.0, **settings})
    async_engine = AsyncEngine(
        max_samples=max_samples,
        request_timeout=config.request_timeout,
        metrics=ServerMetrics(MODEL),
    )
    listener = bind(config.host, config.port)
    url = url_of(listener)
    http = HttpServer(
        build_app(async_engine, config, (MODEL, "alias/of-it")), async_engine, listener
    )
    http.start()
    thread = threading.Thread(
        target=run_engine,
        args=(
            engine,
            async_engine.commands,
            lambda result: http.call_soon(async_engine.deliver, result),
        ),
    )
    thread.start()
    if ready:
        http.call_soon(async_engine.ready, served_model(engine))
    try:
        yield FakeServer(engine, async_engine, http, url, thread)
    finally:
        async_engine.commands.put(Stop())
        thread.join(10)
        http.stop()
        assert not thread.is_alive()


def served_model(engine: FakeEngine) -> ServedModel:
    return ServedModel(
        tokenizer=engine.tokenizer,
        max_len=engine.max_model_len,
        refusal=engine.refusal,
        facts=FACTS,
    )
