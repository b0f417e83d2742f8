"""Ways to use an engine: `LLM` from Python; batch files and the HTTP server by command.

`LLM` is imported when it is first used, so that the command line stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sps2_mega.types import SamplingParams

if TYPE_CHECKING:
    from sps2_mega.serving.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sps2_mega.serving.llm import LLM

    return LLM
