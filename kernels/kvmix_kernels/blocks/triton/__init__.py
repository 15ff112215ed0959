"""Attention over blocks on a GPU in Triton; `launch.py` is its entrance, `kernel.py` what one program computes."""

from .launch import attend, unsupported
from .trial import is_trusted

__all__ = ["attend", "is_trusted", "unsupported"]
