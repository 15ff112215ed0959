"""The spectrum of a profile's loss metric: how many directions of each layer carry the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..plan.document.geometry import format_ranges
from ..plan.tensors.metric import carrying, needs_shrinkage, spectrum
from ..plan.tensors.moments import MomentsFile, Rope, TensorMoments, read_moments
from ..profile import CodedLoss, Profile

SHARE = 0.99
"""Share of the loss that the counted directions carry."""


@dataclass(frozen=True)
class TensorSpectrum:
    """The directions of one layer's keys, or values, in all KV heads.

    Attributes:
        carrying: the fewest directions that carry `SHARE` of the loss.
        heads, head_dim: KV heads, and directions of each.
        loss: nats a predicted token if no direction is kept, but the mean.
    """

    carrying: int
    heads: int
    head_dim: int
    loss: float


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectra of one layer's keys and values, and the rotation of its keys, None if it has no frames."""

    k: TensorSpectrum
    v: TensorSpectrum
    rope: Rope | None


@dataclass(frozen=True)
class ScoreSpectrum:
    """The spectra of all layers, from the moments of one score, and measured losses of plans made from these.

    Attributes:
        coded: the losses, by the tokens of the documents that they were measured on.
        is_for_engines: whether the moments count all pairs of a query and a token.
    """

    score: str
    record: MomentsFile
    layers: dict[int, LayerSpectrum]
    coded: Mapping[int, Sequence[CodedLoss]]
    is_for_engines: bool

    @property
    def notices(self) -> list[str]:
        """Return what a user of the moments should know: unturned keys, and too few tokens."""
        found = []
        fixed = [index for index, layer in self.layers.items() if layer.rope is None]
        if fixed:
            found.append(
                f"{self.score}: frames are off in layers {format_ranges(fixed)}, whose keys no rotary positions of "
                "the model explain; their bases may not fit longer texts than those of the calibration"
            )
        first = next(iter(self.layers.values()))
        directions = max(first.k.head_dim, first.v.head_dim)
        if needs_shrinkage(self.record.tokens, directions):
            found.append(
                f"{self.score}: {self.record.tokens} packed tokens are fewer than the {directions} directions of a "
                "head, so its moments are shrunk towards the identity; measure more --samples"
            )
        return found


def measure_spectra(profile: Profile, folder: Path) -> list[ScoreSpectrum]:
    """Return the spectra of all scores that have moments.

    Args:
        folder: folder of the profile's file.

    Raises:
        DocumentError: if a file of moments is missing, damaged or another one.
    """
    found = []
    for name, score in profile.scores.items():
        if score.moments is not None:
            tokens = score.moments.tokens
            layers = {
                index: LayerSpectrum(_tensor(layer.k, tokens), _tensor(layer.v, tokens), layer.rope)
                for index, layer in read_moments(folder, score.moments).items()
            }
            found.append(ScoreSpectrum(name, score.moments, layers, score.coded_contexts, score.is_for_engines))
    return found


def _tensor(moments: TensorMoments, tokens: int) -> TensorSpectrum:
    eigenvalues = spectrum(moments.metric, moments.covariance, tokens=tokens)
    heads, head_dim = eigenvalues.shape
    return TensorSpectrum(carrying(eigenvalues, SHARE), heads, head_dim, float(eigenvalues.sum()) / 2)
