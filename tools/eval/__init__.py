"""What an attention setting costs in accuracy: texts, tasks, measures and reports of tools/eval_accuracy.py."""
