"""What every launch of the attention kernels shares: splits of the tokens, partial results, and their merge."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..problem import QueryProblem
from .kernel import merge_kernel
from .softmax import ADDITIVE, BOOLEAN, CAUSAL, LOG2_E

LEAST_ROWS, MOST_ROWS = 8, 32
"""Query rows in a program: 8 is what a tensor core multiplies at once."""
MERGED_AT_ONCE = 16
MOST_MERGED = 4096
"""Elements of partial results that are merged at once, at most."""
TOKENS_PER_SPLIT = 1024
"""Tokens in a split, at least: the partial result of a split is written and read once more."""
PROGRAMS_PER_PROCESSOR = 8


@dataclass(frozen=True, eq=False)
class PartialResults:
    """Results of all programs, before they are merged.

    Attributes:
        means: `[B * H_kv, splits, rows, D_v]` float32, weighted means of values.
        logarithms: `[B * H_kv, splits, rows]` float32, to base 2, of the sums of weights.
    """

    means: Tensor
    logarithms: Tensor

    @classmethod
    def of(cls, problem: QueryProblem, splits: int, width: int) -> PartialResults:
        """Make room for results of `width` numbers a query row."""
        rows = problem.batch * problem.kv_heads, splits, problem.ratio * problem.queries
        device = problem.query.device
        return cls(
            torch.empty(*rows, width, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    @property
    def splits(self) -> int:
        """Splits of all parts together."""
        return self.means.shape[1]

    def merge(
        self, problem: QueryProblem, dtype: torch.dtype, sink_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `[B, H, S, width]` in `dtype`, and the natural logarithms of the sums of weights `[B, H, S]`."""
        shape, width, device = problem.query.shape[:3], self.means.shape[3], self.means.device
        output = torch.empty(*shape, width, dtype=dtype, device=device)
        logarithms = torch.empty(shape, dtype=torch.float32, device=device)
        merge_kernel[(problem.batch * problem.kv_heads, problem.ratio * problem.queries)](
            output,
            output.stride()[:3],
            logarithms,
            self.means,
            self.logarithms,
            output if sink_logits is None else sink_logits,
            self.splits,
            problem.kv_heads,
            problem.queries,
            VALUE_DIM=width,
            RATIO=problem.ratio,
            HAS_LOGITS=sink_logits is not None,
            BLOCK=min(MERGED_AT_ONCE, MOST_MERGED // triton.next_power_of_2(width)),
            num_warps=2,
        )
        return output, logarithms


def split(units: int, tokens: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Return the number of splits of `units` of `tokens` each, and the units of one."""
    wanted = PROGRAMS_PER_PROCESSOR * _processors(device)
    each = max(TOKENS_PER_SPLIT // tokens, triton.cdiv(units * programs, wanted), 1)
    return triton.cdiv(units, each), each


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def rows_of_program(problem: QueryProblem) -> int:
    """Return the query rows of a program."""
    return min(MOST_ROWS, max(LEAST_ROWS, int(triton.next_power_of_2(problem.ratio * problem.queries))))


def score_factors(problem: QueryProblem) -> tuple[float, float]:
    """Return the factor of `q.k` and the cap as the kernels take them: to base 2, and ready for tanh."""
    softcap = problem.softcap
    return problem.scaling * (2 / softcap if softcap else 1) * LOG2_E.value, (softcap or 0.0) * LOG2_E.value


def mask_of_rows(mask: Tensor | None, problem: QueryProblem, tokens: int) -> Tensor:
    """Return a mask as the kernels take it, `[B, H, S, tokens]`; anything with these strides where there is none."""
    per_row = problem.query if mask is None else mask.expand(*problem.query.shape[:3], tokens)
    return per_row.view(torch.uint8) if per_row.dtype == torch.bool else per_row


def mask_kind(mask: Tensor | None, is_causal: bool) -> int:
    """Return the kind of a mask; `is_causal` says what None means."""
    if mask is None:
        return int(CAUSAL.value) if is_causal else 0
    return int(BOOLEAN.value if mask.dtype == torch.bool else ADDITIVE.value)
