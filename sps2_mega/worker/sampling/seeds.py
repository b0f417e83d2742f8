"""Random numbers that depend only on a sequence's seed and a position.

A counter-based generator: the same (seed, position) gives the same number on every rank and device,
at any time, in any batch, and after a preemption. Decides nothing about tokens; `sampler` does.
"""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: multiples of it spread over all 64 bits
# Another odd constant, so that samples and positions never share a stream.
_SAMPLE = 0xD1B54A32D192ED03


def uniform(seed: int, position: int) -> float:
    """Number in [0, 1) with 53 random bits, for the token at `position` of a sequence."""
    stream = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((stream + (position + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def derive_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request; sample 0 uses the request's own."""
    if index == 0:
        return seed
    return _mix((_mix((seed ^ _SAMPLE) & _MASK) + index * _SAMPLE) & _MASK)


def derive_seed_from_text(seed: int, text: str) -> int:
    """Seed of a request that gave none: from the job's seed and the request's name, so that it does
    not depend on when the request arrived or what else ran."""
    digest = hashlib.sha256(f"{seed}/{text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _mix(z: int) -> int:
    """Finaliser of SplitMix64 (public domain): every input bit reaches every output bit."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
