"""What `tools/simulate.py` shows: tables and pictures of simulated comparisons."""
