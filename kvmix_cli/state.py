"""Which file a command means. State between commands is files, one folder a model:

    profiles/<org>--<model>/profile.yaml                what `kvmix profile` measured
    profiles/<org>--<model>/profile.partial.jsonl       the same, interrupted
    profiles/<org>--<model>/plans/<name>.yaml           what `kvmix allocate` decided
    profiles/<org>--<model>/plans/<name>.trials.jsonl   what it measured for that, if it did

Nothing named, the newest is taken and stderr says which. `--profiles-dir` or `KVMIX_PROFILES_DIR` moves the folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .console import notice
from .errors import StateError, did_you_mean

PROFILE = "profile.yaml"
JOURNAL = "profile.partial.jsonl"
PLANS = "plans"
ENVIRONMENT = "KVMIX_PROFILES_DIR"
MAX_LINE = 2**16

_chosen: Path | None = None


def use_dir(folder: Path | None) -> None:
    """Use another folder in this process (`--profiles-dir`); None goes back to the environment's."""
    global _chosen
    _chosen = folder


def profiles_dir() -> Path:
    """The folder that holds one folder a model."""
    return _chosen or Path(os.environ.get(ENVIRONMENT) or "profiles")


def slug(model: str) -> str:
    """Folder name of a model: `meta-llama--Llama-2-7b`, `builtin--tiny`, or a local folder's own name."""
    if _holds(Path.is_dir, model):
        name = Path(model).resolve().name
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        name = model.replace("/", "--")
    else:
        name = re.split(r"[/\\]", model.rstrip("/\\"))[-1].replace(":", "--")
    return re.sub(r"[^\w.-]", "-", name).lstrip(".") or "model"


def model_dir(model: str) -> Path:
    """The folder of a model's profile and plans."""
    return profiles_dir() / slug(model)


def profile_path(model: str) -> Path:
    """Where `kvmix profile` writes."""
    return model_dir(model) / PROFILE


def plan_path(model: str, name: str) -> Path:
    """Where `kvmix allocate` writes the plan of that name."""
    return model_dir(model) / PLANS / f"{name}.yaml"


def journal_path(profile: Path) -> Path:
    """The journal of an unfinished profile, beside it: `profile.partial.jsonl`."""
    return profile.with_name(f"{profile.stem}.partial.jsonl")


def trials_path(plan: Path) -> Path:
    """The plans that a search has measured, beside the plan that it writes: `search-3.trials.jsonl`."""
    return plan.with_name(f"{plan.stem}.trials.jsonl")


def find_profile(given: str | Path | None = None, *, model: str | None = None) -> Path:
    """The profile a command means: the file given, or else the newest one of a model.

    Raises:
        StateError: if there is none, if it is unfinished, or if several models have one and none is named.
    """
    if given is not None:
        return _existing(Path(given))
    folder = _only_model(model, "profile", [PROFILE, JOURNAL])
    if not (folder / PROFILE).is_file():
        raise _unfinished(folder)
    return _taken(folder / PROFILE, "profile")


def find_plan(given: str | Path | None = None, *, model: str | None = None) -> Path:
    """The plan a command means: the file given, a plan by its name, or else the newest one of a model.

    Raises:
        StateError: if there is none, or if several models have plans and none is named.
    """
    if given is not None and (Path(given).suffix in (".yaml", ".yml") or _holds(Path.is_file, given)):
        return _existing(Path(given))
    folder = _only_model(model, "plan", [f"{PLANS}/*.yaml"])
    plans = {path.stem: path for path in _newest_first(folder.glob(f"{PLANS}/*.yaml"))}
    if given is None:
        return _taken(next(iter(plans.values())), "plan")
    if str(given) not in plans:
        hint = did_you_mean(str(given), plans) or f"; there are {', '.join(sorted(plans))}"
        raise StateError(f"no plan '{given}' in {folder / PLANS}{hint}")
    return plans[str(given)]


def _only_model(model: str | None, what: str, patterns: list[str]) -> Path:
    """The folder of the model named, or of the only one that has files of these patterns."""
    command = "kvmix profile MODEL" if what == "profile" else "kvmix allocate"
    candidates = sorted({_owner(path) for pattern in patterns for path in profiles_dir().glob(f"*/{pattern}")})
    if model is not None:
        candidates = [folder for folder in candidates if folder == model_dir(model)]
    if not candidates:
        place = profiles_dir() if model is None else model_dir(model)
        raise StateError(f"no {what} in {place}: make one with `{command}`, or name a file with --{what}")
    if len(candidates) > 1:
        names = ", ".join(folder.name for folder in candidates)
        raise StateError(f"{len(candidates)} models have a {what} in {profiles_dir()} ({names}): choose with --model")
    return candidates[0]


def _owner(path: Path) -> Path:
    return path.parent.parent if path.parent.name == PLANS else path.parent


def _unfinished(folder: Path) -> StateError:
    journal = folder / JOURNAL
    return StateError(
        f"profiling was interrupted and left {journal}: finish it with `kvmix profile {_model_of(journal)} --resume`"
    )


def _model_of(journal: Path) -> str:
    """The model in a journal's first line; `MODEL` if it cannot be read."""
    try:
        with journal.open(encoding="utf-8") as file:
            return str(json.loads(file.readline(MAX_LINE))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return "MODEL"


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if journal_path(path).is_file():
        model = _model_of(journal_path(path))
        raise StateError(f"{path} was never finished: run `kvmix profile {model} --resume --out {path}`")
    raise StateError(f"{path} does not exist")


def _taken(path: Path, what: str) -> Path:
    notice(f"using {what} {path}")
    return path


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (-path.stat().st_mtime_ns, path.name))


def _holds(test: Callable[[Path], bool], text: str | Path) -> bool:
    """A test of a path; false for a text that the system does not even take for a path."""
    try:
        return test(Path(text))
    except (OSError, ValueError):
        return False
