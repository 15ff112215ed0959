"""Profile files: scores are added to those that are there."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from .. import state
from ..errors import DocumentError, KvmixError
from ..plan import ModelInfo
from ..profile import Profile


def existing_profile(path: Path) -> Profile | None:
    """Return the profile that is there. Raises KvmixError if it cannot be read, and so not be added to."""
    if not path.exists():
        return None
    try:
        return Profile.load(path)
    except DocumentError as error:
        raise KvmixError(f"{error}; no score can be added to it: remove it, or name another file with --out") from error


def require_same_model(profile: Profile, model: ModelInfo, path: Path) -> None:
    """Raise KvmixError unless a profile is of this model, revision and configuration."""
    from ..models.sources import canonical_id

    if profile.model.model_copy(update={"id": canonical_id(profile.model.id)}) != model:
        raise KvmixError(
            f"{path} is the profile of another model ({profile.model.id}, or another revision or configuration of it); "
            "name another file with --out"
        )


def save_scores(result: Profile, before: Profile | None, path: Path, command: str) -> list[str]:
    """Write scores beside those that the file has already, and return the names of these. Raises OutputError.

    The journal of the measurement is removed.
    """
    from ..profiling import remove_journal

    old = {} if before is None else before.scores
    kept = [name for name in old if name not in result.scores]
    if kept:
        command = f"{_head(path)}\n{command}"
    result.model_copy(update={"scores": {**old, **result.scores}}).save(path, command)
    remove_journal(state.journal_path(path))
    return kept


def _head(path: Path) -> str:
    """Return the commands in the head comment of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[2:] for line in takewhile(lambda line: line.startswith("# "), lines))
