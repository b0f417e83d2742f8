"""Measured terms of a machine for the simulator; the command is `calibrate.py`."""
