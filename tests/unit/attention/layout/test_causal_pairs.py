from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.layout.causal_pairs import causal_pairs

POSITIONS = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted)


def brute(queries, keys, window):
    return sum(j <= i and (window is None or j > i - window) for i in queries for j in keys)


@given(POSITIONS, st.one_of(st.none(), POSITIONS), st.one_of(st.none(), st.integers(1, 40)))
def test_pairs_are_counted_in_closed_form(queries, keys, window):
    queries = range(*queries)
    keys = None if keys is None else range(*keys)
    all_keys = range(queries.stop) if keys is None else keys
    assert causal_pairs(queries, keys, window=window) == brute(queries, all_keys, window)
