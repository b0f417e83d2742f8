"""Sequence-parallel serving of long prompts for Megatron and DeepSpeed models.

Importing this package loads plain data types only (no
torch); the offline API is `sps2_mega.serving.LLM`.
"""

from sps2_mega.config import EngineConfig
from sps2_mega.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["EngineConfig", "SamplingParams", "__version__"]
