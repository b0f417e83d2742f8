"""What an attention setting costs in accuracy: texts, tasks, measures and reports of
benchmarks/eval_accuracy.py."""
