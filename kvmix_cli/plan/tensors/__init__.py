"""Tensors in files beside a plan or profile: moments, bases, codebooks, and the metric they come from. No torch."""
