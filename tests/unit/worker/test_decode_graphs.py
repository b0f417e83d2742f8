"""Sizes of captured decode steps: never too small, not much too large, and few."""

from sps2_mega.worker.decode_graphs import batch_bucket, table_bucket


def test_every_batch_fits_with_little_padding() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 33, 64, 65, 100)] == [
        1, 2, 4, 4, 8, 8, 16, 40, 64, 96, 128,
    ]  # fmt: skip
    for batch in range(1, 300):
        bucket = batch_bucket(batch)
        assert batch <= bucket < batch + 32
        assert bucket < 2 * batch
        assert batch_bucket(bucket) == bucket
    assert len({batch_bucket(n) for n in range(1, 65)}) == 11


def test_tables_double() -> None:
    assert [table_bucket(n) for n in (0, 1, 64, 65, 128, 8192, 8193)] == [
        64, 64, 64, 128, 128, 8192, 16384,
    ]  # fmt: skip
