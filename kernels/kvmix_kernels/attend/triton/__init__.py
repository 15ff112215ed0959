"""Attention on a GPU in Triton; `limits.py` says what it takes, `kernel.py` what a program does."""

from .launch import attend
from .limits import unsupported
from .trial import is_trusted

__all__ = ["attend", "is_trusted", "unsupported"]
