"""Parts of benchmarks/train_tiny.py: data, generated tasks, model, initial weights, optimisation,
evaluation."""
