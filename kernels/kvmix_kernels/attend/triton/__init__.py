"""Attention on a GPU in Triton; `launch.py` says what it takes, `kernel.py` what a program does."""

from .launch import attend, unsupported

__all__ = ["attend", "unsupported"]
