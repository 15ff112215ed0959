"""Sources of models: a hub id, a local folder, a GGUF file, or `builtin:tiny`, the reference model inside the package.

`HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as everywhere.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, StrictDataclassError

from ..errors import ModelError, did_you_mean, first_sentence
from ..network import HUB_ERRORS, causes
from .gguf import SUFFIX, find_gguf

BUILTIN = "builtin:"
ASSETS = Path(__file__).parents[1] / "assets"
ADAPTER = "adapter_config.json"
"""The file that a folder with a LoRA adapter has in the place of config.json."""
META_FILES = ("params.json", "consolidated.*.pth")
"""Files of Meta's own layout, which transformers does not read."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of which a repository with weights has one."""
META_SIBLING = "-hf"
"""Ending of the repositories that hold Meta's models in the layout of transformers."""


def canonical_id(model_id: str) -> str:
    """Return one name for each model: the absolute path of a local folder or GGUF file, anything else as it is.

    `m`, `m/`, `./m`, `/work/m` and a link to it are one model, also from another working folder.
    """
    if model_id.startswith(BUILTIN):
        return model_id
    path = Path(model_id).expanduser()
    is_file = model_id.lower().endswith(SUFFIX) and _is_there(path)
    return str(path.resolve()) if is_file or _is_folder(path) else model_id


def locate(model_id: str) -> str:
    """Return what transformers should load: a folder, a GGUF file, or the hub id as it is.

    Raises:
        ModelError: if there is no such folder, or it holds no model that transformers reads.
    """
    if model_id.startswith(BUILTIN):
        return str(_builtin_folder(model_id.removeprefix(BUILTIN)))
    path = Path(model_id).expanduser()
    if model_id.lower().endswith(SUFFIX):
        return str(find_gguf(model_id, path))
    if _is_folder(path):
        if not any((path / name).is_file() for name in ("config.json", ADAPTER)) and (
            file := find_gguf(model_id, path)
        ):
            return str(file)
        if not any((path / name).is_file() for name in ("config.json", ADAPTER)):
            raise ModelError(_without_config(model_id, path))
        return str(path)
    if _is_there(path):
        raise ModelError(f"{model_id} is a file: give the folder that holds the model")
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelError(f"no folder {model_id}: give a model folder, a hub id or builtin:tiny")
    return model_id


def has_weights(model_id: str, revision: str | None = None) -> bool:
    """Return whether a model's weights are on this machine: its own files, or in the hub's cache."""
    if model_id.startswith(BUILTIN) or _is_there(Path(model_id).expanduser()):
        return True
    try:
        found = [huggingface_hub.try_to_load_from_cache(model_id, name, revision=revision) for name in WEIGHTS]
    except HFValidationError:
        return False
    return any(isinstance(path, str) for path in found)


def meta_sibling(model_id: str) -> str | None:
    """Return the hub id of the same model in transformers' layout, if this one has Meta's; None for any other model.

    Called when a hub id has no readable configuration. Network errors count as None.
    """
    if _is_there(Path(model_id).expanduser()) or model_id.endswith(META_SIBLING):
        return None
    try:
        files = huggingface_hub.list_repo_files(model_id)
        if "config.json" in files or not _has_meta_layout(files):
            return None
        sibling = model_id + META_SIBLING
        return sibling if "config.json" in huggingface_hub.list_repo_files(sibling) else None
    except HUB_ERRORS:
        return None


def has_pickles(source: str) -> bool:
    """Return whether a folder or hub id holds pickled weights and no safetensors. Network errors count as no."""
    try:
        files = [path.name for path in Path(source).iterdir()] if _is_folder(Path(source)) else None
        files = huggingface_hub.list_repo_files(source) if files is None else files
    except HUB_ERRORS:
        return False
    return bool(fnmatch.filter(files, "*.bin")) and not fnmatch.filter(files, "*.safetensors")


def explain(model_id: str, error: BaseException) -> str:
    """Return the reason why a model cannot be loaded and what to do about it, on one line."""
    if any(isinstance(cause, GatedRepoError) for cause in causes(error)):
        page = f"{constants.ENDPOINT}/{model_id}"
        return f"it is gated: accept its licence at {page}, then log in with `hf auth login`"
    if isinstance(error, StrictDataclassError):  # it names the check, and its cause what is wrong
        return f"transformers refuses its config.json ({first_sentence(error.__cause__ or error)}): correct that file"
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        advice = "read that code, then pass --trust-remote-code"
    elif _is_folder(Path(model_id).expanduser()) or not isinstance(error, OSError):
        advice = "its config.json must be that of a causal language model which this transformers knows"
    else:
        advice = (
            "check the name and the network, log in with `hf auth login` or set HF_TOKEN if it is private, "
            "or use a local folder or builtin:tiny"
        )
    return f"{first_sentence(error)}; {advice}"


def _builtin_folder(name: str) -> Path:
    known = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    if name not in known:
        names = ", ".join(BUILTIN + other for other in known)
        raise ModelError(f"no built-in model '{name}'{did_you_mean(name, known)}: there is {names}")
    return ASSETS / name


def _without_config(model_id: str, folder: Path) -> str:
    files = [path.name for path in folder.iterdir()]
    if _has_meta_layout(files):
        return (
            f"{model_id} has Meta's own layout (params.json, consolidated.*.pth), which transformers does not read: "
            f"use the hub's repository of this model whose name ends in {META_SIBLING}, or convert the folder to it"
        )
    return f"{model_id} has no config.json: a model folder holds it, a tokenizer and *.safetensors"


def _has_meta_layout(files: Iterable[str]) -> bool:
    names = list(files)
    return all(fnmatch.filter(names, pattern) for pattern in META_FILES)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
