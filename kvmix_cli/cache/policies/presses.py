"""Scores of kvpress (https://github.com/NVIDIA/kvpress), by name: `press:SnapKVPress(window_size=32)`.

kvpress is imported when such a score is used, and only its scores are: what a press does to a cache needs caches of its
own. `decoding/prompt_scores.py` hands a prompt to the press; tokens that come later are scored by their attention.
"""

from __future__ import annotations

import ast
import importlib
import re
from functools import lru_cache
from typing import Any

from ...errors import PlanError, class_and_sentence, did_you_mean
from ...plan.token_scores import PRESS
from .tokens import TOKEN_SCORES, TokenScore

INSTALL = (
    "`pip install --no-deps kvpress`, then `pip install accelerate cachetools datasets fire pandas peft` as far as "
    "they are missing"
)
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of these classes for settings that a press does not take."""


class PressScore(TokenScore):
    """A score of kvpress for prompts, and attention received for later tokens.

    Attributes:
        press: the press, whose `score` is called.
    """

    waits = True

    def __init__(self, name: str) -> None:
        self.press = _press(name)


def token_score(name: str) -> TokenScore:
    """Return a score of tokens by its name in a plan.

    Raises:
        PlanError: for an unknown name, with the nearest; for a press that is not installed, or does more than to score.
    """
    return PressScore(name) if name.startswith(PRESS) else TOKEN_SCORES[name]()


@lru_cache(maxsize=8)
def _press(name: str) -> Any:
    """Return the press that `press:NAME(setting=value, ...)` names."""
    kind, settings = _parsed(name)
    try:
        kvpress = importlib.import_module("kvpress")
    except ImportError as error:
        raise PlanError(f"the score `{name}` needs kvpress: {class_and_sentence(error)}; {INSTALL}") from error
    scorer: Any = kvpress.ScorerPress
    found: Any = getattr(kvpress, kind, None)
    if not isinstance(found, type):
        presses = [each for each, value in vars(kvpress).items() if isinstance(value, type)]
        raise PlanError(f"kvpress has no press '{kind}'{did_you_mean(kind, presses)}")
    press: Any = found  # its base class is known only where kvpress is installed
    if not issubclass(press, scorer) or press.compress is not scorer.compress:
        raise PlanError(
            f"the press {kind} does more than to score tokens (it masks tokens of single heads, or changes keys and "
            "values); use a press that derives from ScorerPress and only has a score"
        )
    try:
        return found(**settings)
    except _FAULTS as error:
        raise PlanError(f"the press {kind} cannot be made: {class_and_sentence(error)}") from error


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """Return the class and the settings of a press's name. Raises PlanError."""
    text = name.removeprefix(PRESS).strip()
    text = text if not re.fullmatch(r"\w+", text) else f"{text}()"
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(each.arg): ast.literal_eval(each.value) for each in call.keywords if each.arg}
    except (SyntaxError, ValueError):
        pass
    raise PlanError(
        f"cannot read the score `{name}`: write it as press:SnapKVPress(window_size=32), with numbers and texts for "
        "settings (a press inside a press works on single heads, which a kvmix cache does not)"
    )
