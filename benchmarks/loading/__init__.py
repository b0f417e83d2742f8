"""Parts of `load_checkpoint.py`: a folder as a training run writes it, and the measured child."""
