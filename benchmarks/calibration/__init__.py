"""The measured terms of a machine, for the simulator; `calibrate.py` is the command."""
