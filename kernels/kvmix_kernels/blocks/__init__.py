"""Keys and values in the blocks of a serving engine: tokens come alone and in any order, and each stands alone.

An engine gives every layer a number of blocks, each with room for `page` tokens of all KV heads, and every sequence a
table of the blocks that its tokens are in, page by page. A token is written once, where its slot says: it has scales
and zeros of its own, of keys as well as of values, or the static steps of transform codes. So whatever shares, splits
or preempts sequences moves blocks and need not know what is in them.

`naive` is the definition of writing, `cpu` the native path of writing and of attention.
"""

from __future__ import annotations

from .affine import AffineBlocks
from .base import BlockTensor
from .coded import CodedBlocks
from .layer import BlockLayer
from .plain import PlainBlocks

__all__ = ["AffineBlocks", "BlockLayer", "BlockTensor", "CodedBlocks", "PlainBlocks"]
