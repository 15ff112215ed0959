"""The steps of `kvmix demo`: profile, plans, evaluation and generation of the built-in model, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import state
from ..allocation import K_BITS, TRANSFORM, TRANSFORM_SCORE, V_BITS, Budget, allocate
from ..plan import CacheSettings, Plan
from ..plan.windows import Recent
from ..profile import Profile
from .directions import read_basis, with_basis

if TYPE_CHECKING:
    from ..evaluation.results import Report
    from ..evaluation.runner import Progress
    from ..models.loading import LoadedModel

MODEL = "builtin:tiny"
TASKS = ("perplexity", "recall")
RANKED = "rank"
"""Name of the plan that the paper's score and ranking decide."""
CODED = "transform"
"""Name of the plan of transform codes, whose bits follow the loss's own metric."""
AVG_BITS = 2.3
CACHE = CacheSettings(page=32, group_size=32, window=Recent(tokens=32))
"""Small pages and a short window: the contexts are short, and most of them should be quantized."""
SCORES = "grad-norm", TRANSFORM_SCORE
NEW_TOKENS = 60
PROMPT = "def test_copy(self):\n        d = {'a': 1}\n"


@dataclass(frozen=True)
class Effort:
    """The amount of work.

    Attributes:
        samples: calibration samples of 1024 tokens.
        limit: held-out documents, and recall exercises.
        random_plans: plans with as many high-bit layers as the chosen one, at random places.
    """

    samples: int = 30
    limit: int = 10
    random_plans: int = 3


QUICK = Effort(samples=4, limit=3, random_plans=1)
"""About a minute on two cores."""


def make_profile(
    loaded: LoadedModel,
    effort: Effort,
    seed: int,
    out: Path,
    *,
    resume: bool,
    command: str,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure the layers' importance, or with `resume` read or finish what an earlier demo has measured."""
    from ..profiling import ProbeOptions, remove_journal, run_profile
    from ..texts import load_texts

    path = profile_path(out)
    if resume and path.is_file():
        found = Profile.load(path)
        texts = {(each.calibration.samples, each.calibration.seed) for each in found.scores.values()}
        if (found.model, set(found.scores), texts) == (loaded.info, set(SCORES), {(effort.samples, seed)}):
            return found
    journal = state.journal_path(path)
    profile = run_profile(
        loaded,
        SCORES,
        texts=load_texts(),
        source="builtin",
        samples=effort.samples,
        seed=seed,
        options=ProbeOptions(window=CACHE.window),
        journal=journal,
        moments=state.moments_path(path),
        resume=resume,
        on_step=on_step,
    )
    profile.save(path, command)
    remove_journal(journal)
    return profile


def profile_path(out: Path) -> Path:
    """Return the file of the demo's profile."""
    return out / state.slug(MODEL) / state.PROFILE


def make_plans(profile: Profile, effort: Effort, seed: int, out: Path, command: str) -> dict[str, Plan]:
    """Decide and write all plans: of transform codes, ranked, random, and 2 bits everywhere.

    A random plan has as many high-bit layers as the ranked one.
    """
    budget, folder = Budget(avg_bits=AVG_BITS), profile_path(out).parent

    def plan(method: str, seed: int = 0) -> Plan:
        return allocate(profile, budget, method=method, k_bits=K_BITS, v_bits=V_BITS, cache=CACHE, seed=seed)

    basis = read_basis(profile, folder)
    coded = allocate(profile, budget, method=TRANSFORM, cache=CACHE, basis=basis)
    plans = {CODED: with_basis(coded, basis, folder / state.PLANS), RANKED: plan("rank")}
    plans |= {f"random-{number}": plan("random", number) for number in range(seed, seed + effort.random_plans)}
    plans["uniform-2"] = Plan.uniform(profile.model, 2, 2, CACHE)
    for name, each in plans.items():
        each.save(folder / state.PLANS / f"{name}.yaml", command)
    return plans


def evaluate(
    loaded: LoadedModel,
    plans: dict[str, Plan],
    effort: Effort,
    seed: int,
    out: Path,
    *,
    resume: bool,
    progress: Progress,
) -> list[Report]:
    """Measure perplexity and recall of every plan, and of the unquantized cache."""
    from ..cache.subject import Subject
    from ..evaluation import get_task
    from ..evaluation.base import Settings
    from ..evaluation.runner import run_task
    from ..evaluation.runs import RunFolders

    subjects = [Subject(name, plan) for name, plan in plans.items()]
    runs = RunFolders(out / "results", state.slug(MODEL), resume=resume)
    settings = Settings(limit=effort.limit, seed=seed)
    return [run_task(get_task(name), loaded, subjects, settings, runs, progress) for name in TASKS]


def generate_sample(loaded: LoadedModel, plan: Plan, on_text: Callable[[str], None]) -> str:
    """Continue a few lines of code through a plan's cache."""
    from ..cache.mixed import MixedCache
    from ..decoding.generate import generate

    ids = loaded.tokenizer(PROMPT).input_ids
    cache = MixedCache.from_plan(plan, loaded.config)
    return generate(loaded, ids, cache, max_new_tokens=NEW_TOKENS, on_text=on_text).text
