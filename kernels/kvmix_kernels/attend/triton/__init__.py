"""Attention on a GPU in Triton; `limits.py` says what it takes, `kernel.py` what a program does."""

from .launch import attend
from .limits import unsupported

__all__ = ["attend", "unsupported"]
