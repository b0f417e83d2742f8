"""Systems on a cluster of network namespaces, for `cluster.py` and `validate_cluster.py`."""
