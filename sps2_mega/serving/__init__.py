"""Ways to use an engine: `LLM` from Python; batch files and the HTTP server by command."""

from sps2_mega.serving.llm import LLM
from sps2_mega.types import SamplingParams

__all__ = ["LLM", "SamplingParams"]
