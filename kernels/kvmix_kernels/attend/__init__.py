"""Attention of queries over sink | packed tokens | tail.

`naive` is the definition, `cpu` the native path, `triton` the path of GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoded import CodecPages
from ..pages import Coded
from ..runtime import gpu
from ..runtime.fallback import warn_once
from ..runtime.native import library
from ..summaries import Summarized
from . import cpu, naive
from .choice import gathered, with_all_pages, with_chosen_pages
from .problem import AttentionProblem

__all__ = ["AttentionProblem", "attend"]


def attend(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Return output and logarithms of the sums of weights, as `AttentionProblem` describes them.

    On a CPU the native path is the faster one, packed or not, at any number of queries (bench/results.csv, op
    `attend-rows`).
    """
    problem = _with_its_pages(problem)
    if problem.is_differentiated:
        return naive.attend(problem)
    device = problem.query.device
    if gpu.is_usable(device) and (solved := _attend_on_gpu(problem)) is not None:
        return solved
    native = library() if device.type == "cpu" else None
    if native is not None:
        solved = cpu.attend(native, problem)
        if solved is not None:
            return solved
        if not _is_naive(problem):
            warn_once(f"attention over {cpu.describe(problem)} has no CPU kernel; falling back to slow PyTorch")
    return naive.attend(problem)


def _attend_on_gpu(problem: AttentionProblem) -> tuple[Tensor, Tensor] | None:
    """Return output and logarithms from the Triton kernels; None for what they do not take, after a warning."""
    from . import triton

    if _is_naive(problem):
        return None
    reason = triton.unsupported(problem)
    if reason is not None:
        warn_once(f"attention over {reason} has no GPU kernel; falling back to slow PyTorch")
    return triton.attend(problem) if reason is None and triton.is_trusted(problem) else None


def _is_naive(problem: AttentionProblem) -> bool:
    """Return whether only PyTorch attends: in float64, and over pages of codecs whose numbers no kernel knows."""
    is_encoded = any(isinstance(tensor.packed, CodecPages) for tensor in (problem.key, problem.value))
    return is_encoded or problem.query.dtype == torch.float64


def _with_its_pages(problem: AttentionProblem) -> AttentionProblem:
    """Return the problem over the pages that its query reads, as the device's kernels take them."""
    pages = problem.key.packed
    if not isinstance(pages, Summarized):
        return problem
    if not gpu.is_usable(problem.query.device):
        return with_chosen_pages(problem)
    if isinstance(pages.held, Coded) or isinstance(problem.value.packed, Coded):
        warn_once("no GPU kernel reads a choice of pages of transform codes; reading all of them")
        return with_all_pages(problem)
    return gathered(with_chosen_pages(problem))
