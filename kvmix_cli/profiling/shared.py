"""One forward pass for all weight and change probes, and one backward pass for each kind of labels they look at."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import get_args

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.loading import LoadedModel
from ..models.projections import decoder_layers
from . import backward
from .base import KV, ChangeProbe, Labels, Measured, Numbers, WeightProbe
from .changes import Changes
from .choices import Grid
from .observe import observed
from .tally import Tally
from .weights import Weights


def shared_pass(
    loaded: LoadedModel,
    probes: Sequence[WeightProbe | ChangeProbe],
    ids: Tensor,
    grid: Grid = ChangeProbe.grid,
    *,
    per_head: bool = False,
    checkpointing: bool | None = None,
) -> dict[str, Measured]:
    """Measure one sample with all probes at once; afterwards the model is as it was.

    Args:
        ids: `[1, T]`, never padded.
        grid: choices of curves.
        per_head: also score every KV head.
        checkpointing: recompute activations layer by layer instead of keeping them; None decides by size.

    Raises:
        ProjectionError, ModelError, QuantizationError: if the model cannot be measured so.
    """
    start = time.perf_counter()
    model, info, tally = loaded.model, loaded.info, Tally()
    labels = [each for each in get_args(Labels) if any(probe.labels == each for probe in probes)]
    seeing = [probe for probe in probes if isinstance(probe, ChangeProbe)]
    changes = Changes(info, seeing, tally, grid, labels[-1] if labels else None, per_head=per_head)
    weighing = [probe for probe in probes if isinstance(probe, WeightProbe)]
    weights = Weights(loaded, weighing, tally, per_head=per_head)
    with ExitStack() as stack:
        stack.enter_context(backward.differentiable(model, weights))
        stack.enter_context(weights.watched())
        if seeing:
            stack.enter_context(observed(loaded, info.quantizable, changes.see))
        if backward.is_large(model) if checkpointing is None else checkpointing:
            stack.enter_context(backward.checkpointed(decoder_layers(model, info)))
        _run(loaded, ids, labels, tally)
    shared = time.perf_counter() - start - sum(tally.seconds.values())
    return {probe.name: Measured(shared + tally.seconds[probe.name], _layers(loaded, probe, tally)) for probe in probes}


def _run(loaded: LoadedModel, ids: Tensor, labels: Sequence[Labels], tally: Tally) -> None:
    """The forward pass and its backward passes."""
    model = loaded.model
    tally.scale = backward.loss_scale(model)
    try:
        with torch.set_grad_enabled(bool(labels)):
            output = model(input_ids=ids, labels=ids, use_cache=False)  # the model shifts the labels
            for each in labels:
                tally.labels = each
                loss = output.loss if each == "text" else backward.drawn_loss(output.logits[0, :-1], _seed(ids))
                (loss * tally.scale).backward(retain_graph=each != labels[-1])
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"no memory for a backward pass of {ids.shape[1]} tokens through {loaded.info.id}: "
            "use a smaller --seq-len, or --device map on a machine with several GPUs"
        ) from error


def _layers(loaded: LoadedModel, probe: WeightProbe | ChangeProbe, tally: Tally) -> dict[int, KV]:
    """A probe's numbers of all layers."""
    layers = {}
    for index in loaded.info.quantizable:
        pair = [tally.numbers.get((probe.name, index, kind)) for kind in ("key", "value")]
        if None in pair and isinstance(probe, ChangeProbe):
            raise ModelError(
                f"the attention of layer {index} of {loaded.info.id} cannot be seen: use --score grad-norm"
            )
        layers[index] = KV(*(numbers or Numbers(0.0) for numbers in pair))  # 0: the loss does not touch the weight
        _require_finite(layers[index], index, loaded)
    return layers


def _require_finite(pair: KV, index: int, loaded: LoadedModel) -> None:
    if not all(math.isfinite(number) for each in pair for number in (each.value, *each.curve.values())):
        dtype = loaded.dtype
        advice = "its weights may be damaged" if dtype == "float32" else "use --dtype float32 or bfloat16"
        raise ModelError(f"gradients of {loaded.info.id} overflow in {dtype}, first in layer {index}: {advice}")


def _seed(ids: Tensor) -> int:
    """The same for the same sample, so that a resumed run draws the same labels."""
    return zlib.crc32(ids.cpu().numpy().tobytes())
