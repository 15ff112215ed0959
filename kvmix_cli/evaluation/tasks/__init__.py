"""Evaluation tasks, one file or folder each."""
