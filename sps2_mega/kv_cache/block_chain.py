"""Content names of token blocks: a chain of digests over a block and everything before it.

The digest of block i covers the attention settings, the tokens of block i and the digest of block
i-1, so equal digests mean equal keys and values. With SHA-256, tokens need no comparison: two texts
with one digest cannot be constructed, so no request can read another text's cache. A long prompt is
digested once per request, whatever the cache holds.

    root = H(settings)    d0 = H(root, tokens 0..15)    d1 = H(d0, tokens 16..31)    ...
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from sps2_mega.config import CSAConfig


def chain_root(csa: CSAConfig) -> bytes:
    """First digest of chains: everything but tokens that shapes keys and values in one job.

    Spans taken from the topology differ between prompts and are kept beside the digests
    (`prefix_cache`). Transports, ranks and block placement change nothing but rounding.
    """
    settings = "exact" if csa.exact else repr(csa)
    return hashlib.sha256(settings.encode()).digest()


def extend_chain(
    chain: list[bytes], token_ids: Sequence[int], *, root: bytes, block_size: int
) -> None:
    """Append the digests of the full blocks in `token_ids`, which begin at the end of the chain."""
    payload = array("q", token_ids).tobytes()
    width = 8 * block_size
    digest = chain[-1] if chain else root
    for start in range(0, len(payload) - width + 1, width):
        digest = hashlib.sha256(digest + payload[start : start + width]).digest()
        chain.append(digest)
