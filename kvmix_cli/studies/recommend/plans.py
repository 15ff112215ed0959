"""Plans to choose from: those of the allocator at rising stored bits, from a profile that is measured if it is missing.

Transform codes lose least at equal bits, so they are tried first. A model that they cannot be used with gets widths of
whole tensors, by the score `fisher`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ... import state
from ...allocation import TRANSFORM, TRANSFORM_SCORE, AllocationOptions, Budget, allocate, default_score
from ...errors import BudgetError, DocumentError
from ...plan import Plan
from ...plan.tensors.basis import BasisFile
from ...profile import Profile
from ...state import Say
from ...turns import first_free
from ..coded import with_coded_losses
from ..directions import has_directions, read_basis
from ..profiles import existing_profile, require_same_model, save_scores
from .bench import Purpose

if TYPE_CHECKING:
    from ...evaluation.runner import Progress
    from ...models.loading import LoadedModel

STORED_BITS = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8)
"""Budgets that are tried; a method reaches some of them."""
OPTIMISM = 2.0
"""Measured over predicted KL of transform codes, at most about, in contexts longer than those of the profile
(docs/transform-coding.md)."""
SEQ_LEN = 1024
"""Tokens of a calibration document, if the model takes so many."""
NAME_DIGITS = 6


class Way(NamedTuple):
    """A method of allocation, and the score that it needs."""

    method: str
    score: str


WAYS = (Way(TRANSFORM, TRANSFORM_SCORE), Way("ilp", "fisher"))
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Calibrated:
    """A profile with what plans are made of.

    Attributes:
        path: its file.
        basis: directions, for transform codes.
    """

    way: Way
    profile: Profile
    path: Path
    basis: BasisFile | None

    def plans(self) -> list[Plan]:
        """Return the plans that there are at `STORED_BITS`, each with more stored bits than the one before.

        Raises:
            BudgetError, PlanError: if there is none.
        """
        options: AllocationOptions = {} if self.basis is None else {"basis": self.basis}
        found: list[Plan] = []
        failure: BudgetError | None = None
        for bits in STORED_BITS:
            try:
                plan = allocate(self.profile, Budget(stored_bits=bits), method=self.way.method, **options)
            except BudgetError as error:
                failure = error
                continue
            if not found or plan.bits.stored > found[-1].bits.stored:
                found.append(plan)
        if not found and failure is not None:
            raise failure
        return found

    def save(self, plan: Plan, command: str) -> Path:
        """Write a plan, with its basis, where `kvmix allocate` writes it, and return its file. Raises OutputError.

        A file that holds the same plan stays as it is. One of another plan stays, too: the name then gets a hash.
        """
        name = f"{self.way.method}-stored-{plan.provenance['budget']['stored_bits']:g}"
        path = self.path.parent / state.PLANS / f"{name}.yaml"
        if path.exists() and not _holds(path, plan):
            path = path.with_name(f"{name}-{plan.sha256[:NAME_DIGITS]}.yaml")
        if plan.cache.transform is not None and self.basis is not None:
            basis = path.parent / plan.cache.transform.basis
            if not basis.exists():
                self.basis.save(basis)
        if not path.exists() or not _holds(path, plan):
            plan.save(path, command)
        return path


def _holds(path: Path, plan: Plan) -> bool:
    try:
        return Plan.load(path).sha256 == plan.sha256
    except DocumentError:
        return False


def first_guess(plans: Sequence[Plan], loss: float) -> int:
    """Return the index of the smallest plan whose predicted loss, as far as it can be believed, is within `loss`."""
    for index, plan in enumerate(plans):
        predicted = plan.provenance.get("predicted_loss")
        if predicted is not None and OPTIMISM * predicted <= loss:
            return index
    return len(plans) - 1


def has_score(profile: Profile | None, way: Way) -> bool:
    """Return whether a profile has what a way needs."""
    if profile is None:
        return False
    if way.method == TRANSFORM:
        return has_directions(profile)
    return profile.scores[default_score(profile, way.method)].predicts_loss


def calibrate(
    way: Way,
    loaded: LoadedModel,
    path: Path,
    purpose: Purpose,
    command: str,
    *,
    say: Say,
    progress: Progress,
) -> Calibrated:
    """Return the profile of a model; a score that is missing is measured first, or its measurement continued.

    While another process measures it, this one waits.

    Args:
        path: file of the profile.
        say: takes the line that says which file was taken.

    Raises:
        KvmixError: if the model cannot be scored, or files cannot be used.
    """
    profile = first_free([partial(_profile, way, loaded, path, purpose, command, say, progress)])
    return Calibrated(way, profile, path, read_basis(profile, path.parent) if way.method == TRANSFORM else None)


def _profile(
    way: Way, loaded: LoadedModel, path: Path, purpose: Purpose, command: str, say: Say, progress: Progress
) -> Profile:
    """Return the profile that is there, or that is measured now. Raises InUseError while another process does that."""
    before = existing_profile(path)
    if before is not None:
        require_same_model(before, loaded.info, path)
    if before is not None and has_score(before, way):
        say(f"using profile {path}")
        return before
    return _measure(way, loaded, path, purpose, command, say, progress)


def _measure(
    way: Way, loaded: LoadedModel, path: Path, purpose: Purpose, command: str, say: Say, progress: Progress
) -> Profile:
    """Measure a way's score, add it to the profile that is there, and return that."""
    from ...profiling import default_samples, profile_lock, run_profile
    from ...texts import load_texts

    journal, samples = state.journal_path(path), default_samples([way.score])
    texts = load_texts(purpose.calibration, seed=purpose.seed)
    with profile_lock(path):
        before = existing_profile(path)
        if before is not None and has_score(before, way):  # another process has measured it meanwhile
            return before
        with progress(f"profile {way.score}", samples) as step:
            result = run_profile(
                loaded,
                [way.score],
                texts=texts,
                source=purpose.calibration,
                samples=samples,
                seq_len=min(SEQ_LEN, loaded.max_length or SEQ_LEN),
                seed=purpose.seed,
                journal=journal,
                moments=state.moments_path(path),
                resume=journal.exists(),
                before=None if before is None else before.scores,
                on_step=_counted(step),
            )
        result = with_coded_losses(result, loaded, texts, path.parent, say=say, progress=progress)
        save_scores(result, before, path, command)
    return Profile.load(path)


def _counted(step: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a function that is told how much is done, and calls `step` once for each that was not done before."""
    done = 0

    def reach(now: int, total: int) -> None:
        nonlocal done
        while done < now:
            step()
            done += 1

    return reach
