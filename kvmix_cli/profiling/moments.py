"""Sums over documents of what a basis is made of, and their files while a profile is unfinished.

All sums are float64: keys may have means of several hundred beside deviations of one (Qwen2), and a covariance is a
difference of squares.

Few tokens bear most of the loss. A share `LEFT_OUT` of each document's tokens, in each KV head those whose errors would
cost most, is left out of all sums, since the cache keeps such tokens exact; of the others the dear ones are held down
(`POWER`). So directions and bits are for the tokens that have codes. In an engine, which keeps none exact, all count.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from kvmix_kernels.layout import Kind
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad

from ..cache.rotary import turned
from ..errors import DocumentError, first_sentence
from ..files import write_bytes
from ..plan.tensors.moments import FRAME, LayerMoments, Rope, TensorMoments
from .change import LayerAttention

LEFT_OUT = 0.02
"""Share of a document's packed tokens that moments leave out: as many as the cache keeps exact of 1,024 tokens, if they
are two a page, and as many as of eight pages from the first on."""
POWER = 0.7
"""Power of its cost that a token counts by in the metric; the sum of costs stays. With 1 more is lost on both models,
with .5 on builtin:tiny (docs/transform-coding.md)."""

KEPT = ".kept."
"""Part of the names of what is kept of single tokens, which documents are joined in, and not added."""
TOKENS_KEPT = 512
"""Most tokens that are kept of a document."""


class MomentSums:
    """Sums over the tokens of some documents, by layer.

    Args:
        ropes: rotation of the keys of every layer that is measured, None where keys are left as they are.
        frame: positions that share one origin of it.
        keeps_tokens: some tokens are kept as they are, too, to learn codebooks from.
    """

    def __init__(self, ropes: Mapping[int, Rope | None], frame: int = FRAME, *, keeps_tokens: bool = False) -> None:
        self.ropes, self.frame, self._keeps_tokens = ropes, frame, keeps_tokens
        self._sums: dict[str, Tensor] = {}

    @property
    def counts(self) -> tuple[int, int]:
        """Return the predictions that have read something packed, and the tokens that one of them found packed."""
        first = min(self.ropes)
        predictions, packed = (int(self._sums[f"{first}.{name}"]) for name in ("predictions", "packed"))
        return predictions, packed

    def add(self, layer: LayerAttention) -> None:
        """Add one layer of a document."""
        index = layer.index
        parts = {kind: self._in_frames(layer, kind) for kind in layer.states}
        costs = {kind: _costs(*part) for kind, part in parts.items()}
        share, power = (LEFT_OUT, POWER) if layer.grid.keeps_exact else (0.0, 1.0)
        kept = _kept(torch.stack(list(costs.values())).sum(0), share)
        unpacked = parts["key"][1].shape[1] - kept.shape[1]
        counted = pad(kept, (0, unpacked), value=1.0)[..., None]
        for kind, (gradients, states) in parts.items():
            weights = _weights(costs[kind] * kept, power)[..., None]
            self._add(f"{index}.{kind}.gradients", (gradients * weights).mT @ gradients)
            self._add(f"{index}.{kind}.squares", (states * counted).mT @ states)
            self._add(f"{index}.{kind}.states", (states * counted).sum(1))
        readers, packed = layer.readers, layer.packed
        self._add(f"{index}.predictions", torch.tensor(readers.stop - readers.start))
        self._add(f"{index}.packed", torch.tensor(packed.stop - packed.start))
        self._add(f"{index}.tokens", counted[0].sum().long())
        if self._keeps_tokens:
            self._keep(layer)

    def _keep(self, layer: LayerAttention) -> None:
        """Keep some packed tokens of a document, evenly spaced, with keys as they are before RoPE."""
        count = layer.packed.stop - layer.packed.start
        places = torch.linspace(0, count - 1, min(count, TOKENS_KEPT)).long()
        rope = self.ropes[layer.index]
        for kind, gradients in layer.gradients.items():
            found = [gradients[0].cpu()[:, places], layer.states[kind][0, :, layer.packed].cpu()[:, places]]
            if kind == "key" and rope is not None:
                found = [turned(each, rope, -(layer.packed.start + places)) for each in found]
            self._add(f"{layer.index}.{kind}{KEPT}squares", found[0].square().bfloat16())
            self._add(f"{layer.index}.{kind}{KEPT}states", found[1].bfloat16())

    def kept(self, index: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """Return the keys or values of the tokens that were kept, and the squares of their gradients, `[H, n, D]`."""
        states, squares = (self._sums[f"{index}.{kind}{KEPT}{name}"].float() for name in ("states", "squares"))
        return states, squares

    def _in_frames(self, layer: LayerAttention, kind: Kind) -> tuple[Tensor, Tensor]:
        """Return gradients `[H, P, D]` of packed tokens and states `[H, T, D]` of all but the sinks, in float64."""
        gradients = layer.gradients[kind][0].cpu().double()
        states = layer.states[kind][0, :, layer.grid.cache.sink :].cpu().double()
        rope = self.ropes[layer.index] if kind == "key" else None
        if rope is None:
            return gradients, states
        return self._turned(gradients, rope), self._turned(states, rope)

    def _turned(self, states: Tensor, rope: Rope) -> Tensor:
        """Return keys `[H, T, D]`, the first of them after the sinks, turned back to the start of their frame."""
        starts = torch.arange(states.shape[1]) // self.frame * self.frame
        return turned(states, rope, -starts)

    def layer(self, index: int) -> LayerMoments:
        """Return the moments of one layer, in float64."""
        predictions, tokens = self._sums[f"{index}.predictions"], self._sums[f"{index}.tokens"]

        def moments(kind: str) -> TensorMoments:
            mean = self._sums[f"{index}.{kind}.states"] / tokens
            covariance = self._sums[f"{index}.{kind}.squares"] / tokens - mean[:, :, None] * mean[:, None]
            metric = self._sums[f"{index}.{kind}.gradients"] / predictions
            return TensorMoments(metric.numpy(), covariance.numpy(), mean.numpy())

        return LayerMoments(moments("key"), moments("value"), self.ropes[index])

    def layers(self) -> dict[int, LayerMoments]:
        """Return the moments of all layers."""
        return {index: self.layer(index) for index in self.ropes}

    def merge(self, other: MomentSums) -> None:
        """Add the sums of other documents."""
        for name, value in other._sums.items():
            self._add(name, value)

    def encode(self) -> bytes:
        """Return the sums as the bytes of a safetensors file."""
        return save({name: value.contiguous() for name, value in self._sums.items()})

    def merge_encoded(self, data: bytes) -> None:
        """Add sums that were encoded."""
        for name, value in load(data).items():
            self._add(name, value)

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all. Raises OutputError."""
        write_bytes(path, self.encode())

    def merge_file(self, path: Path) -> None:
        """Add the sums in a file. Raises DocumentError if it is missing or damaged."""
        try:
            self.merge_encoded(path.read_bytes())
        except (OSError, SafetensorError, RuntimeError) as error:
            why = f"cannot resume with this file: {first_sentence(error)}; leave out --resume to start over"
            raise DocumentError(str(path), [why]) from error

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            value = torch.cat([self._sums[name], value], dim=1) if KEPT in name else self._sums[name] + value
        self._sums[name] = value


class MomentParts:
    """The sums of each finished document of a run, in a file of its own beside the journal; in memory without one.

    A part is written before the record of its document, so that a journal never has a record without its part.
    """

    def __init__(
        self,
        journal: Path | None,
        ropes: Mapping[int, Rope | None],
        frame: int,
        *,
        keeps_tokens: bool = False,
        resume: bool,
    ) -> None:
        self._journal, self._ropes, self._frame, self._keeps_tokens = journal, ropes, frame, keeps_tokens
        self._total = self.begin()
        if journal is not None and not resume:
            remove_parts(journal)

    def begin(self) -> MomentSums:
        """Return the empty sums of a document."""
        return MomentSums(self._ropes, self._frame, keeps_tokens=self._keeps_tokens)

    def keep(self, number: int, sums: MomentSums) -> None:
        """Keep the sums of a document. Raises OutputError."""
        if self._journal is None:
            self._total.merge(sums)
        else:
            sums.save(_part(self._journal, number))

    def total(self, documents: int) -> MomentSums:
        """Return the sums of all documents. Raises DocumentError if one is missing or damaged."""
        if self._journal is not None:
            self._total = self.begin()
            for number in range(documents):
                self._total.merge_file(_part(self._journal, number))
        return self._total


def remove_parts(journal: Path) -> None:
    """Delete the parts beside a journal."""
    for path in journal.parent.glob(f"{journal.stem}.*.safetensors"):
        path.unlink(missing_ok=True)


def _part(journal: Path, number: int) -> Path:
    """Return the file of a document: `profile.partial.0.safetensors` beside `profile.partial.jsonl`."""
    return journal.with_name(f"{journal.stem}.{number}.safetensors")


def _costs(gradients: Tensor, states: Tensor) -> Tensor:
    """Return what an error as large as the differences between states would cost each packed token, `[H, P]`.

    That is `g^T S g`, twice a loss in nats, for a gradient `g` and the covariance `S` of the states.

    Args:
        gradients: `[H, P, D]`.
        states: `[H, T, D]`.
    """
    covariance = torch.stack([head.T.cov(correction=0) for head in states])
    return ((gradients @ covariance) * gradients).sum(-1)


def _kept(costs: Tensor, share: float) -> Tensor:
    """Return 1 for the tokens that count and 0 for a share of the costliest, `[H, P]`: as many in every head."""
    costliest = costs.topk(round(share * costs.shape[1]), dim=1).indices
    return torch.ones_like(costs).scatter_(1, costliest, 0.0)


def _weights(costs: Tensor, power: float) -> Tensor:
    """Return what the gradients of tokens of these costs `[H, P]` count, so that the sum of costs stays; 0 for 0."""
    smallest = torch.finfo(costs.dtype).tiny
    weights = torch.where(costs > 0, costs.clamp(min=smallest) ** (power - 1), 0.0)
    return weights * costs.sum(1, keepdim=True) / (weights * costs).sum(1, keepdim=True).clamp(min=smallest)
