"""Gradients where weights are packed into 4 or 8 bits, of which no gradient exists.

A linear module `y = x W^T` passes on `g`, the gradient of its output. The gradient of the weight that it stands for,
unpacked, is `g^T x`, summed over the tokens: what a dense module would have got. So nothing of the packed weight is
read, and every format gives the same score up to what packing changes in `x` and `g`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError, first_sentence
from ..models.loading import LoadedModel
from ..models.projections import packed_modules

TOLERANCE = 0.1
"""Largest relative error of a gradient that a packed module passes on. Formats that quantize their input as well are
off by one or two percent; one whose backward pass stops at that step, by about all."""
TRIAL_TOKENS = 8


def watch_outputs(module: nn.Module, measure: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a function with the gradient `[out, in]` of what would be a linear module's weight, as soon as it is known.

    Returns:
        The handle that ends it.
    """

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        x = inputs[0].detach()

        def known(gradient: Tensor) -> None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            measure(gradient.flatten(0, -2).to(dtype).T @ x.flatten(0, -2).to(dtype))

        if not output.requires_grad:
            output.requires_grad_()  # nothing before it needs a gradient
        output.register_hook(known)

    return module.register_forward_hook(watch)


def check_differentiable(loaded: LoadedModel) -> None:
    """Raise ModelError for a model whose packed weights pass no gradient on, or a wrong one."""
    quantizer = getattr(loaded.model, "hf_quantizer", None)
    if quantizer is None:
        return
    settings = quantizer.quantization_config
    if getattr(settings, "dequantize", False):
        return
    method = getattr(settings.quant_method, "value", settings.quant_method)
    if quantizer.is_trainable is not True:
        raise _not_differentiable(loaded, method, "pass no gradient on")
    kinds = {(type(module), type(getattr(module, "weight", None))): module for module in packed_modules(loaded.model)}
    for module in kinds.values():
        if fault := _fault(module, loaded.model.dtype):
            raise _not_differentiable(loaded, method, fault)


def _fault(module: Any, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the gradient that a linear module passes on; None if it is right.

    A step `v` from `x` changes the output by `d`; `d` times the derivative in the direction `v` must be `|d|^2`.
    """
    device = next(iter((*module.parameters(), *module.buffers()))).device
    generator = torch.Generator().manual_seed(0)
    size = (2, TRIAL_TOKENS, module.in_features)
    x, step = (each.to(device, dtype) for each in torch.randn(size, generator=generator))
    x.requires_grad_()
    try:
        with torch.enable_grad():
            output = module(x)
            change = (module(x + step) - output).detach().float()
            (gradient,) = torch.autograd.grad(output, x, change.to(output.dtype))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"pass no gradient on: {first_sentence(error)}"
    wanted = change.double().square().sum()
    wrong = abs(1 - (gradient.double() * step.double()).sum() / wanted).item() if wanted else 0.0
    return None if wrong <= TOLERANCE else f"pass a gradient on that is wrong by {wrong:.0%}"


def _not_differentiable(loaded: LoadedModel, method: str, fault: str) -> ModelError:
    return ModelError(
        f"the weights of {loaded.info.id} are quantized ({method}) and {fault}: use --score kl, loss or error, or "
        "profile the checkpoint without weight quantization; its plan fits both"
    )
