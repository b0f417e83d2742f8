"""Requests to a server and what became of them; `serving.py` and `serving_tbt.py` are the
commands."""
