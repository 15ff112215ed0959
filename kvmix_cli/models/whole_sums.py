"""Linear layers of a model in parts whose sums are those of one process.

Only a model in parts needs this file: older versions of transformers have no such styles to import.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.tensor_parallel import ColwiseParallel


class WholeSums(ColwiseParallel):
    """A style of a linear layer whose input is spread over the ranks: each rank has some of the rows of its weight.

    The input is gathered, so that every sum over its channels is taken on one rank, in the order of one process.
    transformers' own style has columns of the weight instead and adds up what the ranks make of their channels: in
    another order, by which now and then a key is rounded to another code.
    """

    def __init__(self) -> None:
        super().__init__(input_layouts=Shard(-1), output_layouts=Replicate())

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a forward pass with the whole input `[..., in_features]`."""
        states, *others = args
        if not isinstance(states, DTensor):
            states = self._from_local_last_dim_shard(states, mesh, module.in_features)
        states = states.redistribute(placements=[Replicate()])
        is_local = self.should_use_local_tensors(module)
        return (states.to_local() if is_local else states, *others), kwargs
