"""Requests to a server and their records, for `serving.py` and `serving_tbt.py`."""
