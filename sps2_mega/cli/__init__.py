"""The `sps2` command: flags in, configuration out.

Nothing heavy is imported before the flags are right.
"""
