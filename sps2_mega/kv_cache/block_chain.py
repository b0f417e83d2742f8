"""Names of token blocks that say what is in them and everything before: a chain of digests.

The digest of block i covers the attention settings, the tokens of block i and the digest of block
i-1, so equal digests mean equal keys and values. SHA-256 is used, and tokens are not compared
afterwards: nobody can make two texts with one digest, so no request can read another text's cache,
and a digest of a long prompt is made once per request whatever the cache holds.

    root = H(settings)    d0 = H(root, tokens 0..15)    d1 = H(d0, tokens 16..31)    ...
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from sps2_mega.config import CSAConfig


def chain_root(csa: CSAConfig) -> bytes:
    """The digest that chains begin with: of everything besides tokens that shapes keys and values
    in one job.

    Spans from the topology differ between prompts and are kept beside the digests (`prefix_cache`).
    Transports, ranks and block placement change nothing but rounding.
    """
    settings = "exact" if csa.exact else repr(csa)
    return hashlib.sha256(settings.encode()).digest()


def extend_chain(
    chain: list[bytes], token_ids: Sequence[int], *, root: bytes, block_size: int
) -> None:
    """Append the digests of the full blocks in `token_ids`, which begin where the chain ends."""
    payload = array("q", token_ids).tobytes()
    width = 8 * block_size
    digest = chain[-1] if chain else root
    for start in range(0, len(payload) - width + 1, width):
        digest = hashlib.sha256(digest + payload[start : start + width]).digest()
        chain.append(digest)
