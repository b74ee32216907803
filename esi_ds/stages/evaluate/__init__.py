"""Evaluation: answers, verdicts, tasks, comparisons."""
