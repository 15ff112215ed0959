"""Any task of lm-eval, read through the quantized cache. Importing this imports neither lm-eval nor torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ....errors import EvaluationError, did_you_mean

if TYPE_CHECKING:
    from .task import HarnessTask

INSTALL = "pip install 'kvmix[eval]'"


class UnknownTask(EvaluationError):
    """Neither our own nor one of lm-eval's; `near` has the nearest of these."""

    def __init__(self, said: str, near: Sequence[str] = ()) -> None:
        self.near = tuple(near)
        super().__init__(said)


def harness_kind(name: str, ours: Iterable[str]) -> type[HarnessTask]:
    """The class that runs a task of lm-eval. Raises UnknownTask if lm-eval is not installed.

    Args:
        ours: names of our own tasks, for the message.
    """
    if importlib.util.find_spec("lm_eval") is None:
        known = tuple(ours)
        raise UnknownTask(
            f"no task '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}, "
            f"and those of lm-eval, which is not installed: {INSTALL}"
        )
    from .task import HarnessTask

    return HarnessTask
