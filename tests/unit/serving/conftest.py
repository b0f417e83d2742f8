"""A server over an engine without a model, and its client; some tests define others."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import tokenizer_samples as samples
from fake_engine import FakeEngine
from fake_server import FakeServer, serving

from sps2_mega.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def server(tokenizer) -> Iterator[FakeServer]:
    with serving(FakeEngine(tokenizer, max_model_len=200)) as running:
        yield running


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server.client()
