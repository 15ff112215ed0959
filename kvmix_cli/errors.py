"""Every error a user can cause, and nothing else.

All are classes of one tree:

    KvmixError                  the command line prints one line and exits 1
    ├── ModelError              a model that cannot be loaded, or that has nothing to quantize
    │   └── ProjectionError     its K and V projections cannot be found
    ├── TextError               calibration or evaluation text that is missing, empty or unreadable
    ├── DocumentError           a plan or profile file with faults (all of them, each with its line)
    ├── PlanError               a plan that does not fit the model
    ├── BudgetError             a budget that no plan can meet
    ├── ExportError             a plan that another engine has no way to express
    ├── StateError              which profile or plan is meant cannot be told from the folder
    │   └── InUseError          another process is writing the file, as long as it lives
    ├── CacheError              a cache that is used in a way it does not allow
    ├── PolicyError             a transform or policy that a model's attention cannot go with
    ├── QuantizationError       numbers that cannot be quantized (NaN, Inf, out of the scale's range)
    ├── EvaluationError         a task or gate that cannot be run as asked
    │   └── UnknownTaskError    a name that no task has, ours or lm-eval's
    ├── ExtensionError          a file of the user's own, named by --import, that cannot be used
    └── OutputError             a file that cannot be written
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "std::bad_alloc",
)
"""Parts of the messages, in small letters, of runtime errors that are about memory but have no class of their own."""
MOST_FAULTS = 20
"""Faults that one line names; a file of another kind has thousands."""


class KvmixError(Exception):
    """A fault that a user can cause, told in one line: what happened, where, and what to do about it."""


class ModelError(KvmixError):
    """A model that cannot be loaded or used."""


class ProjectionError(ModelError):
    """The K and V projections of a model cannot be found."""


class TextError(KvmixError):
    """Text that is missing, empty or unreadable."""


class DocumentError(KvmixError):
    """A plan or profile file that does not hold together; lists its faults with their lines.

    Attributes:
        faults: all of them, also those that the message only counts.
    """

    def __init__(self, source: str, faults: Iterable[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        super().__init__(f"{source}: {together(self.faults)}")


class PlanError(KvmixError):
    """A plan that does not fit the model it is used with."""


class BudgetError(KvmixError):
    """A budget that no plan can meet."""


class ExportError(KvmixError):
    """A plan that another engine cannot express."""


class StateError(KvmixError):
    """The profile or plan that a command should use cannot be determined."""


class InUseError(StateError):
    """A file that another process is writing at this moment."""


class CacheError(KvmixError):
    """A cache that is used in a way it does not allow."""


class PolicyError(KvmixError):
    """A transform or policy that the model's attention cannot go with."""


class QuantizationError(KvmixError):
    """Numbers that cannot be quantized."""


class EvaluationError(KvmixError):
    """A task, gate or result that cannot be used as asked."""


class UnknownTaskError(EvaluationError):
    """A name that no task has, neither kvmix's nor lm-eval's.

    Args:
        theirs: lm-eval's tasks in words, such as "14000 of lm-eval".
        near: the nearest names of lm-eval.
        ours: names of kvmix's own tasks.
    """

    def __init__(self, name: str, theirs: str, near: Iterable[str] = (), ours: Iterable[str] = ()) -> None:
        self.name, self.theirs, self.near = name, theirs, tuple(near)
        known = tuple(ours)
        listed = f"{', '.join(known)}, and {theirs}" if known else theirs
        super().__init__(f"no task '{name}'{did_you_mean(name, known)}; there are {listed}")

    def among(self, ours: Iterable[str]) -> UnknownTaskError:
        """Return the same error with the names of kvmix's own tasks."""
        return UnknownTaskError(self.name, self.theirs, self.near, ours)


class ExtensionError(KvmixError):
    """A Python file of the user's own that cannot be used."""


class OutputError(KvmixError):
    """A file or folder that cannot be written."""


class FieldsLeftOut(UserWarning):
    """A notice, and no error: records of a text have fields that are in none of the documents.

    Attributes:
        source: the text as it was named.
        read, left_out: names of fields.
    """

    def __init__(self, source: str, read: Sequence[str], left_out: Sequence[str]) -> None:
        self.source, self.read, self.left_out = source, list(read), list(left_out)
        super().__init__(f"{source}: fields read from its records: {', '.join(read)}; left out: {', '.join(left_out)}")

    def as_json(self) -> dict[str, list[str]]:
        """Return the fields as plain data."""
        return {"read": self.read, "left_out": self.left_out}


def together(faults: Sequence[str]) -> str:
    """Return faults on one line: the first of them, and how many more there are."""
    left = len(faults) - MOST_FAULTS
    return "; ".join(faults if left <= 0 else [*faults[:MOST_FAULTS], f"and {left} more"])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` with the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's message, on one line; the error's class if it says nothing.

    A KeyError has its class before it, as its message is a mere name.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return ("KeyError: " if isinstance(error, KeyError) and lines else "") + text.split(". ")[0].rstrip(".:")


def class_and_sentence(error: BaseException) -> str:
    """Return an error's class and the first sentence of its message, `ValueError: no such thing`."""
    return f"{type(error).__name__}: {first_sentence(error).removeprefix('KeyError: ')}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that no memory was left: of a GPU, of the CPU's allocator or of Python.

    This is the only test of it in the program. It needs no torch.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
