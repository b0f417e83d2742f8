"""Parts of benchmarks/train_tiny.py: data, tasks, model, initial weights, training, evaluation."""
