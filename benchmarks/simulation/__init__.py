"""Evaluation by simulation: comparisons, claims and published results."""
