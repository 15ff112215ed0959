"""Codebooks of a profile, and presets that code keys and values by them."""

from __future__ import annotations

from pathlib import Path

from ..errors import DocumentError
from ..plan.presets import Preset
from ..plan.tensors.codebooks import Codebooks
from ..profile import Profile

SCORE = "codebooks"
"""The score that learns codebooks."""


def has_codebooks(profile: Profile) -> bool:
    """Return whether a profile has codebooks."""
    return SCORE in profile.scores and profile.scores[SCORE].codebooks is not None


def with_codebooks(preset: Preset, profile: Profile, source: Path, folder: Path) -> Preset:
    """Copy the codebooks of a profile into a folder, and return the preset with codecs that find them there.

    Args:
        source: folder of the profile's file.
        folder: folder of the plans.

    Raises:
        DocumentError: if the profile has no codebooks.
        PlanError: if their file cannot be used.
        OutputError: if it cannot be written.
    """
    record, codecs = profile.score(SCORE).codebooks, preset.cache.codecs
    if record is None or codecs is None:
        why = f"it has no codebooks; profile again with --score {SCORE} --replace"
        raise DocumentError(f"profile of {profile.model.id}", [why])
    name = f"codebooks-{record.sha256[:12]}.safetensors"
    if not (folder / name).is_file():
        Codebooks.load(source / record.file, record.sha256).save(folder / name)
    own = codecs.model_copy(update={"codebooks": name, "sha256": record.sha256}).inside(folder)
    cache = preset.cache.model_copy(update={"codecs": own})
    return preset.model_copy(update={"cache": cache, "codebooks": None})
