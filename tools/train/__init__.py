"""Parts of tools/train_tiny.py: data, generated tasks, model, initial weights, optimisation, evaluation."""
