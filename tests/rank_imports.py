"""Imports of nearly every rank, for the process that ranks are forked from. No thread may start
here, and no device be touched."""

import gc

gc.disable()

import sps2_mega.engine.start  # noqa: E402
import sps2_mega.mcore.gpt  # noqa: E402, F401
from sps2_mega.mcore._compat import eager_import  # noqa: E402

with eager_import("cpu"):
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.parallel_state  # noqa: F401

# A collection in a rank would write to the pages of all objects, which it shares until then.
gc.freeze()
gc.enable()
