"""Texts, tasks, measures and reports of benchmarks/eval_accuracy.py."""
