"""Any task of lm-eval, read through the quantized cache. Importing this imports neither lm-eval nor torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ....errors import UnknownTaskError

if TYPE_CHECKING:
    from .task import HarnessTask

INSTALL = "pip install 'kvmix[eval]'"


def harness_kind(name: str, ours: Iterable[str]) -> type[HarnessTask]:
    """Return the class that runs a task of lm-eval.

    Args:
        ours: names of kvmix's own tasks, for the message.

    Raises:
        UnknownTaskError: if lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnknownTaskError(name, f"those of lm-eval, which is not installed: {INSTALL}", ours=ours)
    from .task import HarnessTask

    return HarnessTask
