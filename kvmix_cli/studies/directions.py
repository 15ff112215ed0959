"""Directions of a profile's moments, and what is solved from them: plans that find their basis, and presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .. import state
from ..allocation import TRANSFORM, TRANSFORM_SCORE, Budget, allocate, make_bases
from ..errors import DocumentError, StateError
from ..plan import CacheSettings, ModelInfo, Plan
from ..plan.presets import Preset
from ..plan.tensors.basis import BasisFile
from ..plan.tensors.directions import Directions
from ..plan.tensors.moments import read_moments
from ..profile import Profile
from ..state import Say, unsaid
from .codebooks import SCORE as CODEBOOKS_SCORE
from .codebooks import has_codebooks, with_codebooks


@dataclass(frozen=True)
class FoundProfile:
    """A profile and the folder of its file; directions of its moments are worked out once, for all that need them."""

    profile: Profile
    folder: Path
    _bases: dict[Directions, BasisFile] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, path: Path) -> FoundProfile:
        """Read a profile. Raises DocumentError."""
        return cls(Profile.load(path), path.parent)

    def basis(self, directions: Directions) -> BasisFile:
        """Return directions of the profile's moments. Raises as `read_basis`."""
        if directions not in self._bases:
            self._bases[directions] = read_basis(self.profile, self.folder, directions)
        return self._bases[directions]


def has_directions(profile: Profile) -> bool:
    """Return whether a profile has moments, from which directions are made."""
    return TRANSFORM_SCORE in profile.scores and profile.scores[TRANSFORM_SCORE].moments is not None


def read_basis(profile: Profile, folder: Path, directions: Directions = "loss") -> BasisFile:
    """Return the directions of a profile's moments.

    Args:
        folder: folder of the profile's file.
        directions: where they come from.

    Raises:
        DocumentError: if the profile has no moments, or their file cannot be used.
        BudgetError: if the moments of a layer are missing, or not finite.
    """
    record = profile.score(TRANSFORM_SCORE).moments
    if record is None:
        why = f"it has no moments of keys and values; profile again with --score {TRANSFORM_SCORE} --replace"
        raise DocumentError(f"profile of {profile.model.id}", [why])
    return make_bases(profile, read_moments(folder, record), directions)


def with_basis(plan: Plan, basis: BasisFile, folder: Path) -> Plan:
    """Write the basis that a plan names into a folder, and return the plan, which finds it there. Raises OutputError.

    A plan without transform codes is returned as it is.
    """
    settings = plan.cache.transform
    if settings is None:
        return plan
    path = folder / settings.basis
    if not path.is_file():
        basis.save(path)
    return plan.model_copy(update={"cache": plan.cache.model_copy(update={"transform": settings.inside(folder)})})


def keep_basis(plan: Plan, folder: Path) -> None:
    """Copy the basis that a plan names into the folder of another file of the plan.

    A plan without transform codes names none.

    Raises:
        PlanError: if the basis cannot be used.
        OutputError: if it cannot be written.
    """
    settings = plan.cache.transform
    if settings is not None and not (folder / settings.basis).is_file():
        BasisFile.load(Path(settings.located(settings.basis)), settings.sha256).save(folder / settings.basis)


def preset_plan(preset: Preset, name: str, model: ModelInfo, say: Say = unsaid) -> Plan:
    """Return the plan of a model from a preset; one with a method is solved from the newest profile of the model.

    The basis of such a plan, or the codebooks of its codecs, are written beside the plans of the model.

    Raises:
        StateError: if no profile of the model has directions, or codebooks, if the preset needs them.
        DocumentError: if a file is faulty.
        BudgetError, PlanError: if the preset does not fit the model.
        OutputError: if the basis cannot be written.
    """
    if preset.avg_bits is None and preset.codebooks is None:
        return preset.plan(model, name)
    try:
        found = FoundProfile.load(state.find_profile(model=model.id, say=say))
    except StateError as error:
        raise _unmeasured(preset, name, model) from error
    folder = state.model_dir(model.id) / state.PLANS
    if preset.codebooks is not None and has_codebooks(found.profile):
        return with_codebooks(preset, found.profile, found.folder, folder).plan(model, name)
    if preset.avg_bits is None or not has_directions(found.profile):
        raise _unmeasured(preset, name, model)
    return solved_preset(preset, model, found, Budget(avg_bits=preset.avg_bits), preset.cache, folder)


def solved_preset(
    preset: Preset, model: ModelInfo, found: FoundProfile, budget: Budget, cache: CacheSettings, folder: Path
) -> Plan:
    """Return transform codes in the directions and widths of a preset, solved for a budget.

    Args:
        model: the model that the plan is for.
        found: profile with moments.
        cache: pages, sinks and window of the plan.
        folder: folder that the basis is written into.

    Raises:
        DocumentError: if the profile's moments cannot be used.
        BudgetError, PlanError: if no plan meets the budget, the cache settings do not fit transform codes, or the
            profile is of another model.
        OutputError: if the basis cannot be written.
    """
    basis = found.basis(preset.directions)
    plan = allocate(found.profile, budget, method=TRANSFORM, cache=cache, basis=basis, code_bits=preset.code_bits)
    plan.check_model(model)
    return with_basis(plan, basis, folder)


def _unmeasured(preset: Preset, name: str, model: ModelInfo) -> StateError:
    what, score = ("directions", TRANSFORM_SCORE) if preset.codebooks is None else ("codebooks", CODEBOOKS_SCORE)
    command = state.profile_command(model.id, "--score", score)
    return StateError(f"preset '{name}' needs the {what} of {model.id}, which no profile has: run `{command}`")
