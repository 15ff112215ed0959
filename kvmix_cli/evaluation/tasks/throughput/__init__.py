"""Prompt and decode tokens a second, at equal batch and at the largest that fits: docs/throughput.md.

Nothing is imported here, so that `summary`, which reads records back, needs no torch.
"""
