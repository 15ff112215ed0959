"""The spectrum of a loss metric as a table, and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from ...counting import counted
from ...evaluation.results import Table
from ...profile import CodedLoss
from ...studies.spectrum import SHARE, LayerSpectrum, ScoreSpectrum, TensorSpectrum


class TensorSpectrumJson(TypedDict):
    """Directions of a layer's keys, or values, in all KV heads; `carrying` of them carry 99 % of the loss."""

    carrying: int
    directions: int
    loss: float


class RopeJson(TypedDict):
    """Rotated channels of a layer's keys: `channels` of every head from `start` on."""

    layout: str
    start: int
    channels: int


class LayerSpectrumJson(TypedDict):
    """The spectrum of one layer; `rope` is null where its keys are not turned to frames."""

    index: int
    k: TensorSpectrumJson
    v: TensorSpectrumJson
    rope: RopeJson | None


class CodedLossJson(TypedDict):
    """The loss of a plan of transform codes: `predicted` by moments alone, and `measured`, nats a predicted token."""

    bits: float
    exact: int
    context: int
    predicted: float
    measured: float


class MomentsJson(TypedDict):
    """The moments of a score: their file, over how much they are means, their spectrum by layer, losses of plans."""

    file: str
    sha256: str
    documents: int
    predictions: int
    tokens: int
    frame: int
    spectrum: list[LayerSpectrumJson]
    coded: list[CodedLossJson]


def spectrum_table(spectrum: ScoreSpectrum, model: str, folder: Path) -> Table:
    """Return a table of how many directions carry the loss, by layer; `folder` is the profile's."""
    record = spectrum.record
    columns = ["layer", "K directions", "of", "K loss", "V directions", "of", "V loss", "frames"]
    rows = [
        [f"{index}", *_cells(layer.k), *_cells(layer.v), "off" if layer.rope is None else f"{record.frame}"]
        for index, layer in spectrum.layers.items()
    ]
    total = sum(layer.k.loss + layer.v.loss for layer in spectrum.layers.values())
    footer = (
        f"loss: nats a predicted token if only the mean were kept; {total:.4g} in all layers\n"
        f"over {counted(record.documents, 'document')}, {counted(record.tokens, 'packed token')} and "
        f"{counted(record.predictions, 'prediction')}"
        f"{', all pairs of them, for engines' if spectrum.is_for_engines else ''}\n"
        f"tensors: {folder / record.file}"
    )
    for context, losses in spectrum.coded.items():
        footer += f"\ncodes:   {_coded_text(losses, context)}"
    return Table(
        f"directions of {model} that carry {SHARE:.0%} of the loss, by {spectrum.score}", columns, rows, footer
    )


def spectrum_json(spectrum: ScoreSpectrum) -> MomentsJson:
    """Return the record of the moments, with their spectrum by layer."""
    record = spectrum.record
    return {
        "file": record.file,
        "sha256": record.sha256,
        "documents": record.documents,
        "predictions": record.predictions,
        "tokens": record.tokens,
        "frame": record.frame,
        "spectrum": [_layer_json(index, layer) for index, layer in spectrum.layers.items()],
        "coded": [_coded_json(each, context) for context, losses in spectrum.coded.items() for each in losses],
    }


def _coded_json(coded: CodedLoss, context: int) -> CodedLossJson:
    return {
        "bits": coded.bits,
        "exact": coded.exact,
        "context": context,
        "predicted": coded.predicted,
        "measured": coded.measured,
    }


def _coded_text(coded: Sequence[CodedLoss], context: int) -> str:
    """Return `in contexts of 1024 tokens 2.26, 2.06, 1.69 times the loss ... with 1, 2, 4 exact tokens a page`."""
    counts = ", ".join(f"{each.exact}" for each in coded)
    ratios = ", ".join(f"{each.measured / each.predicted:.3g}" for each in coded)
    return (
        f"in contexts of {context} tokens {ratios} times the loss that moments promise is measured, "
        f"with {counts} exact tokens a page"
    )


def _cells(tensor: TensorSpectrum) -> list[str]:
    return [f"{tensor.carrying}", f"{tensor.heads * tensor.head_dim}", f"{tensor.loss:.2g}"]


def _layer_json(index: int, layer: LayerSpectrum) -> LayerSpectrumJson:
    k, v = (
        TensorSpectrumJson(carrying=each.carrying, directions=each.heads * each.head_dim, loss=each.loss)
        for each in (layer.k, layer.v)
    )
    if layer.rope is None:
        return {"index": index, "k": k, "v": v, "rope": None}
    rope = RopeJson(layout=layer.rope.layout, start=layer.rope.start, channels=2 * len(layer.rope.frequencies))
    return {"index": index, "k": k, "v": v, "rope": rope}
