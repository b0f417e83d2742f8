"""Imports of nearly every rank, for the process that ranks are forked from. No thread may start
here, and no device be touched."""

import sps2_mega.engine.start
import sps2_mega.mcore.gpt  # noqa: F401
from sps2_mega.mcore._compat import eager_import

with eager_import("cpu"):
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.parallel_state  # noqa: F401
