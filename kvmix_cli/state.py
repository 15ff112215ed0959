"""Files that commands hand to each other, one folder a model.

    profiles/<org>--<model>/profile.yaml                what `kvmix profile` measured
    profiles/<org>--<model>/profile.safetensors         tensors of the score fisher-metric
    profiles/<org>--<model>/profile.partial.*           the same, interrupted
    profiles/<org>--<model>/plans/<name>.yaml           what `kvmix allocate` decided
    profiles/<org>--<model>/plans/<name>.trials.jsonl   what it measured for that, if it did

The folder of a local model folder is named after it and has a hash of its path, so that two checkpoints of one name
never share files. A command that names no file takes the newest and says which. `--profiles-dir` or
`KVMIX_PROFILES_DIR` moves the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from .errors import StateError, did_you_mean
from .files import behind_links

PROFILE = "profile.yaml"
JOURNAL = "profile.partial.jsonl"
PLANS = "plans"
ENVIRONMENT = "KVMIX_PROFILES_DIR"
MAX_LINE = 2**16
MAX_NAME = 150
"""Bytes of a folder's name; file systems allow 255, and names of results hold it with others."""
MOST_NAMES = 10
"""Plans that an error names."""

Say = Callable[[str], None]
"""Takes a line that the user should read, such as which file is used."""

_FAMILY = re.compile(r"^provenance: \{.*\bmethod: pareto\b", re.MULTILINE)
_OPTIONS_HASH = re.compile(r"-[0-9a-f]{6}(?=\+|$)")
_MODEL = re.compile(r"""^model: \{id: ("[^"\n]*"|'[^'\n]*'|[^,}\n]+)""", re.MULTILINE)

_chosen: Path | None = None


def unsaid(line: str) -> None:
    """Say nothing, as `Say`."""


def use_dir(folder: Path | None) -> None:
    """Use another folder in this process (`--profiles-dir`); None goes back to the environment's."""
    global _chosen
    _chosen = folder


def profiles_dir() -> Path:
    """Return the folder that holds one folder a model."""
    return _chosen or Path(os.environ.get(ENVIRONMENT) or "profiles")


def slug(model: str) -> str:
    """Return the folder name of a model: `meta-llama--Llama-2-7b`, `builtin--tiny`, `checkpoint-500--1f3a5c7e`."""
    if _holds(Path.is_dir, model) or (model.lower().endswith(".gguf") and _holds(Path.is_file, model)):
        path = Path(model).expanduser().resolve()
        return _short(f"{_plain_name(path.name)}--{_hash(str(path))}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return _short(_plain_name(model.replace("/", "--")))
    return _short(_plain_name(re.split(r"[/\\]", model.rstrip("/\\"))[-1].replace(":", "--")))


def _plain_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name).lstrip(".") or "model"


def _short(name: str) -> str:
    """Return a name that file systems take, still different for different names."""
    encoded = name.encode()
    if len(encoded) <= MAX_NAME:
        return name
    return f"{encoded[:MAX_NAME].decode(errors='ignore')}--{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def model_dir(model: str) -> Path:
    """Return the folder of a model's profile and plans."""
    return profiles_dir() / slug(model)


def profile_path(model: str) -> Path:
    """Return the file that `kvmix profile` writes."""
    return model_dir(model) / PROFILE


def journal_path(profile: Path) -> Path:
    """Return the journal of an unfinished profile, beside it: `profile.partial.jsonl`."""
    return profile.with_name(f"{profile.stem}.partial.jsonl")


def moments_path(profile: Path) -> Path:
    """Return the file of a profile's moments of keys and values, beside it: `profile.safetensors`."""
    return profile.with_suffix(".safetensors")


def trials_path(plan: Path) -> Path:
    """Return the file of the plans that a search has measured, beside the plan it writes: `search-3.trials.jsonl`."""
    return plan.with_name(f"{plan.stem}.trials.jsonl")


def recorded_models() -> dict[str, Path]:
    """Return the models that have a profile or plans, each with the folder of these, by the names in the files."""
    files = [*profiles_dir().glob(f"*/{PROFILE}"), *all_plans()]
    found = {_recorded_model(path): _owner(path) for path in files}
    return {name: folder for name, folder in found.items() if name is not None}


def all_plans() -> list[Path]:
    """Return the plans of all models, by model and name."""
    return sorted(profiles_dir().glob(f"*/{PLANS}/*.yaml"))


def find_profile(given: str | Path | None = None, *, model: str | None = None, say: Say = unsaid) -> Path:
    """Return the profile that a command means: the file given, or else the newest one of a model.

    Raises:
        StateError: if there is none, if it is unfinished, or if several models have one and none is named.
    """
    if given is not None:
        return behind_links(_existing(Path(given)))
    folder = _only_model(model, "profile", [PROFILE, JOURNAL], say)
    if not (folder / PROFILE).is_file():
        raise _unfinished(folder)
    say(f"using profile {folder / PROFILE}")
    return folder / PROFILE


def check_owner(path: Path, recorded: str, model: str | None) -> None:
    """Raise StateError if a model was named, and the file that was named as well is of another one.

    Args:
        recorded: id of the model that the file names.
    """
    if model is not None and slug(model) != slug(recorded):
        raise StateError(f"{path} is of {recorded}, not of {model}: leave out --model, or name a file of that model")


def find_plan(given: str | Path | None = None, *, model: str | None = None, say: Say = unsaid) -> Path:
    """Return the plan that a command means: the file given, a plan by its name, or else the newest one of a model.

    A plan of a family (`--method pareto`) is never the newest: it has to be named.

    Raises:
        StateError: if there is none, or if several models have plans and none is named.
    """
    if given is not None and (Path(given).suffix in (".yaml", ".yml") or os.sep in str(given)):
        return _existing(Path(given))
    if given is not None and _holds(Path.is_file, given):
        return Path(given)
    folder = _only_model(model, "plan", [f"{PLANS}/*.yaml"], say)
    plans = {path.stem: path for path in _newest_first(folder.glob(f"{PLANS}/*.yaml"))}
    if given is None:
        single = next((path for path in plans.values() if not _FAMILY.search(_head(path))), None)
        if single is None:
            raise StateError(
                f"{folder / PLANS} has only plans of a family, of which none is the default: name one with --plan; "
                f"there are {_some(plans)}"
            )
        say(f"using plan {single}")
        return single
    name = str(given) if str(given) in plans else _with_hash(str(given), plans)
    if name is None:
        hint = did_you_mean(str(given), plans) or f"; there are {_some(plans)}"
        raise StateError(f"no plan '{given}' in {folder / PLANS}{hint}")
    say(f"using plan {plans[name]}")
    return plans[name]


def _some(names: Collection[str]) -> str:
    """Return names as text; of many, as many as a line takes."""
    left = len(names) - MOST_NAMES
    shown = ", ".join(sorted(names)[:MOST_NAMES])
    return shown if left <= 0 else f"{shown} and {left} more (`kvmix list plans`)"


def _with_hash(given: str, names: Iterable[str]) -> str | None:
    """Return the one name that is the given name with a hash of options, `rank-3-1f3a5c`; None if it is not one."""
    found = [name for name in names if _OPTIONS_HASH.sub("", name) == given]
    return found[0] if len(found) == 1 else None


def _only_model(model: str | None, what: str, patterns: list[str], say: Say) -> Path:
    """Return the folder of the model named, or of the only one that has files of these patterns."""
    for_plan = ["kvmix", "allocate", "--avg-bits", "3", *(["--model", model] if model else []), *_folder_option()]
    command = profile_command(model or "MODEL") if what == "profile" else shlex.join(for_plan)
    candidates = sorted({_owner(path) for pattern in patterns for path in profiles_dir().glob(f"*/{pattern}")})
    if model is not None:
        candidates = [folder for folder in candidates if folder == model_dir(model)] or [
            folder for folder in candidates if _is_former(folder, model)
        ]
    if not candidates:
        place = profiles_dir() if model is None else model_dir(model)
        raise StateError(f"no {what} in {place}: make one with `{command}`, or name a file with --{what}")
    if len(candidates) > 1:
        names = ", ".join(folder.name for folder in candidates)
        raise StateError(f"{len(candidates)} models have a {what} in {profiles_dir()} ({names}): choose with --model")
    if model is not None and candidates[0] != model_dir(model):
        say(f"{candidates[0]} is from an earlier kvmix; new files of {model} go to {model_dir(model)}")
    return candidates[0]


def _is_former(folder: Path, model: str) -> bool:
    """Return whether a folder holds files of a local model folder under the name without a hash of earlier versions."""
    if not _holds(Path.is_dir, model) or folder.name != _plain_name(Path(model).resolve().name):
        return False
    files = [folder / PROFILE, *folder.glob(f"{PLANS}/*.yaml")]
    owners = {_recorded_model(path) for path in files if path.is_file()} - {None}
    return bool(owners) and all(Path(str(owner)).resolve() == Path(model).resolve() for owner in owners)


def _recorded_model(path: Path) -> str | None:
    """Return the id of the model that a profile or plan file names; None if it does not say."""
    match = _MODEL.search(_head(path))
    return None if match is None else match[1].strip().strip("'\"")


def _head(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MAX_LINE)
    except OSError:
        return ""


def is_headed(path: Path, *formats: str) -> bool:
    """Return whether a file is, or was meant to be, of one of these formats: it says so, whatever else is in it."""
    return any(re.search(rf"^format: {re.escape(each)}$", _head(path), re.MULTILINE) for each in formats)


def _owner(path: Path) -> Path:
    return path.parent.parent if path.parent.name == PLANS else path.parent


def _unfinished(folder: Path) -> StateError:
    journal = folder / JOURNAL
    return StateError(f"profiling was interrupted and left {journal}: finish it with `{_resume_command(journal)}`")


def _resume_command(journal: Path, *more: str) -> str:
    """Return the command that continues an unfinished profile, with the settings in the journal's first line."""
    try:
        with journal.open(encoding="utf-8") as file:
            settings = json.loads(file.readline(MAX_LINE))
    except (OSError, ValueError, RecursionError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    words = ["kvmix", "profile", str(settings.get("model", "MODEL")), *_options(settings)]
    return shlex.join([*words, *([] if more else _folder_option()), *more, "--resume"])


def profile_command(model: str, *options: str) -> str:
    """Return the command that measures a model, for advice: with the folder of profiles, if one was named."""
    return shlex.join(["kvmix", "profile", model, *options, *_folder_option()])


def _folder_option() -> list[str]:
    """Return the option that leads another command to the same folder, if one was given."""
    return [] if _chosen is None else ["--profiles-dir", str(_chosen)]


def _options(settings: dict[str, Any]) -> list[str]:
    """Return the options of `kvmix profile` that settings of a journal stand for."""
    names = {
        "revision": "--revision",
        "dtype": "--dtype",
        "scores": "--score",
        "bits": "--bits",
        "group_sizes": "--group-size",
        "encode": "--encode",
        "window": "--window",
        "frame": "--frame",
        "evict": "--evict",
        "source": "--calibration",
        "samples": "--samples",
        "seq_len": "--seq-len",
        "seed": "--seed",
    }
    found: list[str] = []
    for name, option in names.items():
        value = settings.get(name)
        if value is not None:
            found += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    longer = settings.get("longer")
    if isinstance(longer, dict):
        found += ["--longer", f"{longer.get('samples')}x{longer.get('seq_len')}"]
    return found + (["--granularity", "head"] if settings.get("per_head") is True else [])


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if journal_path(path).is_file():
        command = _resume_command(journal_path(path), "--out", str(path))
        raise StateError(f"{path} was never finished: run `{command}`")
    if _holds(Path.is_dir, path):
        raise StateError(f"{path} is a folder: name the file in it that is meant")
    if _holds(Path.exists, path):
        raise StateError(f"{path} is a pipe or a device: name a file")
    raise StateError(f"{path} does not exist")


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (-path.stat().st_mtime_ns, path.name))


def _holds(test: Callable[[Path], bool], text: str | Path) -> bool:
    """Return a test of a path; false for a text that the system does not even take for a path."""
    try:
        return test(Path(text).expanduser())
    except (OSError, ValueError, RuntimeError):
        return False
