"""The user's own task files: what is wrong with them is said, where lm-eval would pass over them."""

from __future__ import annotations

from pathlib import Path

import yaml

from ....errors import EvaluationError


class _Loader(yaml.SafeLoader):
    """YAML as lm-eval writes it: `!function module.name` stays a text here."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def check_folder(folder: Path) -> None:
    """Raise EvaluationError if there is no task file in a folder, or one that cannot be read."""
    if not folder.is_dir():
        what = "is a file; give the folder it is in" if folder.exists() else "does not exist"
        raise EvaluationError(f"--include-path {folder} {what}")
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise EvaluationError(f"--include-path {folder} has no task: there is no *.yaml in it")
    for path in paths:
        _check_file(path)


def _check_file(path: Path) -> None:
    try:
        config = yaml.load(path.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise EvaluationError(f"{where}: broken YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(config, dict):
        raise EvaluationError(
            f"{path}: a task file is a mapping with `task:` or `group:`, not a {type(config).__name__}"
        )
    includes = config.get("include") or []
    for include in [includes] if isinstance(includes, str) else includes:
        if not (path.parent / include).is_file():
            raise EvaluationError(f"{path}: includes {include}, which does not exist")
