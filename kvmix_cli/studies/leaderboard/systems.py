"""`kvmix eval --systems`: published methods, as the presets have them, at equal stored bytes on the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import state
from ...allocation import Budget, allocate
from ...errors import BudgetError, EvaluationError, PlanError, StateError
from ...plan import CacheSettings, ModelInfo, Plan
from ...plan.presets import Preset, find_preset, presets, put_on
from ...plan.presets.scaling import LAYOUT, scaled
from ...profile import parse_choice
from ...state import PLANS, Say, profile_command, unsaid
from ..codebooks import SCORE as CODEBOOKS_SCORE
from ..codebooks import has_codebooks, with_codebooks
from ..directions import FoundProfile, has_directions, solved_preset
from .board import Board, check_tasks, measure, rank
from .candidates import CandidatePlan, Omission
from .standings import Comparison, Standing, compare

if TYPE_CHECKING:
    from ...evaluation.base import Settings
    from ...evaluation.runner import Progress
    from ...evaluation.runs import RunFolders
    from ...models.loading import LoadedModel

TASKS = ("perplexity", "recall", "memory", "throughput")
TASK_OPTIONS: Mapping[str, Any] = {"batches": (1,)}
"""Options of single tasks, if nothing else is asked for."""
STORED_BITS = (2.0, 2.5, 3.0, 4.0)
CHAMPION = "kivi-2"
"""The same width everywhere: what every other row is compared with."""
LAYERS: Mapping[str, str] = {
    "layers": "fisher",
    "layers-error": "error",
    "layers-kl": "kl",
    "layers-taylor": "taylor",
}
"""Rows of widths by layer from a profile, without any preset, and the scores that decide them."""
GROUP_SIZES = (64, 128)
"""Of these rows, as far as a score knows them."""
COMBINATIONS = (
    *LAYERS,
    "layers+rotate-2",
    "mikv+rotate-2",
    "zipcache+rotate-2",
    "keydiff+rotate-2",
    "leverage+rotate-2",
    "kvzip+rotate-2",
)
"""Rows that are no preset: widths by layer, and two methods, of which the second takes no bytes of its own."""


def find_measured(given: Path | None, model: str | None, say: Say = unsaid) -> FoundProfile | None:
    """Return the profile that is given, or the newest of a model; None for a model that is named and has none.

    Raises:
        StateError: if a profile that is given does not exist, or no model can be told.
        DocumentError: if the file is faulty.
    """
    try:
        path = state.find_profile(given, model=model, say=say)
    except StateError:
        if given is not None or model is None:
            raise
        say(f"no profile of {model}: rows that need one are left out")
        return None
    return FoundProfile.load(path)


def rows_of_systems() -> tuple[str, ...]:
    """Return the names of all rows: every preset, and the combinations."""
    return (*presets(), *COMBINATIONS)


def system_plans(
    model: ModelInfo,
    context: int,
    *,
    names: Sequence[str] = (),
    stored_bits: Sequence[float] = STORED_BITS,
    measured: FoundProfile | None = None,
) -> tuple[list[CandidatePlan], list[Omission]]:
    """Return the plan of every row at every size, and rows that have none, each with the reason.

    Args:
        context: tokens of the contexts that are measured, whose bytes numbers of tokens to keep are scaled to.
        names: rows, `PRESET` or `PRESET+PRESET`; all of them if empty.
        stored_bits: sizes.
        measured: the model's profile; None leaves out rows that need one.

    Raises:
        StateError, DocumentError: if there is no preset of a name, or a file is faulty.
        EvaluationError: if no row has a plan.
        OutputError: if a basis cannot be written.
    """
    rows = tuple(dict.fromkeys(names or rows_of_systems()))
    for part in (part for name in rows for part in name.split("+")):
        if part not in LAYERS:
            find_preset(part)
    plans: list[CandidatePlan] = []
    left_out: list[Omission] = []
    for bits, name in product(stored_bits, rows):
        try:
            plans.append(CandidatePlan(bits, name, _plan(name, model, bits, context, measured)))
        except (BudgetError, PlanError) as error:
            left_out.append(Omission(bits, name, str(error)))
    if not plans:
        raise EvaluationError(f"no system has a plan at these sizes: {left_out[0].reason}")
    return plans, left_out


def hold_systems(
    model: ModelInfo,
    load: Callable[[], LoadedModel],
    *,
    tasks: Sequence[str] = TASKS,
    options: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    runs: RunFolders | None = None,
    names: Sequence[str] = (),
    stored_bits: Sequence[float] = STORED_BITS,
    measured: FoundProfile | None = None,
    progress: Progress | None = None,
) -> Board:
    """Measure every system at every size, and compare each with the same width everywhere.

    Args:
        load: function that loads the model; called once, after all plans were made.
        options: options of single tasks.
        names, stored_bits, measured: see `system_plans`.
        tasks, settings, runs, progress: see `board.hold`.

    Raises:
        KvmixError: before anything is measured, for what no row can meet; later, if nothing can be measured.
    """
    from ...evaluation.base import Settings

    settings = settings or Settings()
    check_tasks(tasks)
    plans, left_out = system_plans(model, settings.length, names=names, stored_bits=stored_bits, measured=measured)
    loaded = load()
    plans[0].plan.check_model(loaded.info)
    reports = measure(plans, loaded, tasks, settings, runs, progress, {**TASK_OPTIONS, **(options or {})})
    standings = rank(plans, reports)
    return Board(CHAMPION, standings, reports, list(_comparisons(standings, settings.seed)), {}, left_out)


def _plan(name: str, model: ModelInfo, stored_bits: float, context: int, measured: FoundProfile | None) -> Plan:
    """Return the plan of a row. Raises PlanError or BudgetError if it has none of this size."""
    base, *added = name.split("+")
    if base in LAYERS:
        plan = _layers(LAYERS[base], model, stored_bits, measured)
    elif (preset := find_preset(base)).bits is None:
        plan = _coded(preset, base, model, stored_bits, measured)
    else:
        plan = scaled(_with_its_codebooks(preset, base, model, measured), base, model, stored_bits, context)
    plan.check_model(model)
    for each in added:
        cache = put_on(plan.cache, each, f"'{base}'")
        plan = Plan.build(model, plan.layers, cache, {**plan.provenance, "with": added})
    return plan


def _layers(score: str, model: ModelInfo, stored_bits: float, measured: FoundProfile | None) -> Plan:
    """Return the exact solver's widths by layer, in those groups of 64 and 128 that the score knows, pages of 128."""
    if measured is None or score not in measured.profile.scores:
        raise _unmeasured(model, score)
    known = {group for key in measured.profile.score(score).choices[0] for _, group in [parse_choice(key)]}
    return allocate(
        measured.profile,
        Budget(stored_bits=stored_bits),
        method="ilp",
        score=score,
        group_sizes=[size for size in GROUP_SIZES if size in known],
        cache=CacheSettings.model_validate({**LAYOUT, "page": 128}),
    )


def _coded(preset: Preset, name: str, model: ModelInfo, stored_bits: float, measured: FoundProfile | None) -> Plan:
    """Return transform codes in the preset's directions and pages, with sinks and window of the layout."""
    if measured is None or not has_directions(measured.profile):
        raise _unmeasured(model, "fisher-metric", f"preset '{name}' ")
    cache = CacheSettings.model_validate({**LAYOUT, "page": preset.cache.page})
    return solved_preset(preset, model, measured, Budget(stored_bits=stored_bits), cache, measured.folder / PLANS)


def _with_its_codebooks(preset: Preset, name: str, model: ModelInfo, measured: FoundProfile | None) -> Preset:
    """Return a preset with the codebooks of a profile, if it needs any."""
    if preset.codebooks is None:
        return preset
    if measured is None or not has_codebooks(measured.profile):
        raise _unmeasured(model, CODEBOOKS_SCORE, f"preset '{name}' ")
    return with_codebooks(preset, measured.profile, measured.folder, measured.folder / PLANS)


def _unmeasured(model: ModelInfo, score: str, what: str = "it ") -> PlanError:
    command = profile_command(model.id, "--score", score)
    return PlanError(f"{what}needs the score {score}: run `{command}`")


def _comparisons(standings: Sequence[Standing], seed: int) -> Iterator[Comparison]:
    """Yield each system beside the champion of its size, where both were measured."""
    champions = {each.stored_bits: each for each in standings if CHAMPION in each.names}
    for each in standings:
        champion = champions.get(each.stored_bits)
        if champion is None or each is champion:
            continue
        for name in each.names:
            found = compare((name, each), (CHAMPION, champion), seed)
            if found is not None:
                yield found
