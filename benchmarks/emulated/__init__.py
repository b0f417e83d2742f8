"""Systems side by side on a cluster of network namespaces; `cluster.py` and `validate_cluster.py`
are the commands."""
