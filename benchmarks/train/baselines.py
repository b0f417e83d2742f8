"""Bits per byte of the held-out files under general compressors and a 5-gram model.

These give the trained model's figure a scale. All of them see the held-out files as one text, which
is kind to gzip and xz; the 5-gram model and `xz_after_training_files` know the training files, as
the model does.
"""

from __future__ import annotations

import gzip
import lzma

import numpy as np

from benchmarks.train.corpus import Corpus

ORDER = 5


def baseline_bits_per_byte(corpus: Corpus) -> dict[str, float]:
    train = np.concatenate(list(corpus.train.values()))
    text = np.concatenate(list(corpus.held_out.values()))
    before, after = train.tobytes(), text.tobytes()
    sizes = {
        "gzip": len(gzip.compress(after, 9)),
        "xz": len(_xz(after)),
        "xz_after_training_files": len(_xz(before + after)) - len(_xz(before)),
    }
    bits = {name: 8 * size / len(after) for name, size in sizes.items()}
    return bits | {"5-gram": ngram_bits_per_byte(train, text, ORDER)}


def ngram_bits_per_byte(train: np.ndarray, text: np.ndarray, order: int) -> float:
    """Bits per byte of an interpolated byte model with Witten-Bell weights.

    A context length that occurred n times, followed by t different bytes, leaves t / (n + t) to the
    next shorter one.
    """
    probabilities = np.full(len(text), 1 / 256)
    for size in range(1, order + 1):
        grams, counts = np.unique(_grams(train, size), return_counts=True)
        contexts, starts, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, starts)
        asked = _grams(text, size)
        seen = _look_up(grams, counts, asked)
        total = _look_up(contexts, totals, asked >> 8)
        distinct = _look_up(contexts, kinds, asked >> 8)
        # The first size - 1 bytes have no context of this length and keep the shorter ones'
        # probability.
        shorter = probabilities[size - 1 :]
        known = total > 0
        mixed = (seen + distinct * shorter) / np.where(known, total + distinct, 1)
        probabilities[size - 1 :] = np.where(known, mixed, shorter)
    return float(-np.log2(probabilities).mean())


def _grams(text: np.ndarray, size: int) -> np.ndarray:
    """All runs of `size` bytes as integers, the last byte lowest, [len(text) - size + 1]."""
    codes = np.zeros(len(text) - size + 1, dtype=np.int64)
    for i in range(size):
        codes = codes << 8 | text[i : len(codes) + i]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Value of each key in `asked`; 0 if there is none. `keys` are sorted."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
