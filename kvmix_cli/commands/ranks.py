"""What torchrun's ranks share: the commands that they can start, and how each gets its model."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import KvmixError
from ..ranks import current

SHARED = ("profile", "eval")
"""Commands whose samples ranks can share."""

TensorParallel = Annotated[
    bool,
    typer.Option("--tensor-parallel", help="Under torchrun: give each rank a part of the model instead of a copy."),
]


def meet(command: Sequence[str]) -> None:
    """Find the other ranks, if torchrun has started several.

    Args:
        command: the words before any options, such as `["eval"]`.

    Raises:
        KvmixError: for a command that they cannot share.
    """
    ranks = current()
    if ranks.world == 1:
        return
    if not set(command) & set(SHARED):
        name = shlex.join(["kvmix", *command])
        raise KvmixError(f"torchrun is for {' and '.join(SHARED)}: start `{name}` without it, in one process")
    ranks.connect()
