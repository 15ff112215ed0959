"""Every preset in a whole model: beside other sequences, padded on the left, in beams, copied, and going back."""

import copy

import pytest
import torch
from evaluating import save_small
from learned_books import with_made_up_codebooks
from with_moments import save_with_moments

from kvmix_cli.allocation import Budget
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.decoding.feed import prefill
from kvmix_cli.errors import PlanError, PolicyError
from kvmix_cli.evaluation.tasks.memory import predicted_bytes
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import Plan
from kvmix_cli.plan.presets import find_preset, presets
from kvmix_cli.studies.codebooks import with_codebooks
from kvmix_cli.studies.directions import FoundProfile, solved_preset

LAYERS = 4
PADDING, MORE, TAKEN_BACK, SWAPPED = 37, 170, 5, [1, 0]
CONTEXT = 400
LONGER = dict.fromkeys(("h2o-512", "streaming-512", "morphkv-512", "pyramidkv"), 620) | {"minikv": 900}
"""Tokens of contexts in which less would be neither packed nor dropped."""
READ = 128
"""Tokens that presets with selective reading read at a step here, in place of 2,048."""
TWICE = ("kvzip", "kvzip-heads")
"""They read a prompt a second time, which a forward of the model cannot do by itself."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of four narrow layers with random weights, and its profile."""
    place = tmp_path_factory.mktemp("small")
    save_small(place / "model", LAYERS)
    loaded = load_model(str(place / "model"), device="cpu")
    profile = save_with_moments(place / "profile.yaml", loaded.info)
    with_made_up_codebooks(profile, place).save(place / "profile.yaml")
    return loaded, FoundProfile.load(place / "profile.yaml")


def planned(name, small):
    """Return the plan of a preset, which reads fewer tokens than there are here, if it chooses what it reads."""
    loaded, found = small
    preset = find_preset(name)
    if preset.bits is None:
        budget = Budget(avg_bits=preset.avg_bits)
        return solved_preset(preset, loaded.info, found, budget, preset.cache, found.folder / "plans")
    if preset.codebooks is not None:
        preset = with_codebooks(preset, found.profile, found.folder, found.folder / "plans")
    plan = preset.plan(loaded.info, name)
    if plan.cache.reading is None:
        return plan
    fewer = {"reading": plan.cache.reading.model_copy(update={"tokens": READ}), "sink": 4}
    window = plan.cache.window.model_copy(update={"tokens": 64})
    return Plan.build(loaded.info, plan.layers, plan.cache.model_copy(update={**fewer, "window": window}))


def tokens(count, seed):
    return torch.randint(20, 4000, (2, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
@torch.inference_mode()
def test_every_preset(name, small):
    """Its bytes are those predicted; rows of a batch, padded or not, beams, a copy and a step back change nothing."""
    loaded, plan = small[0], planned(name, small)
    context = LONGER.get(name, CONTEXT)
    prompts, first, more, last = (tokens(count, seed) for seed, count in enumerate((context, 1, MORE, TAKEN_BACK + 2)))
    mask = torch.ones(2, context + 2 + MORE + len(last[0]), dtype=torch.long)

    def fed(cache, ids, rows=slice(None)):
        """Return the logits of ids that are fed through a cache."""
        seen = cache.get_seq_length() + ids.shape[1]
        return loaded.model(ids, past_key_values=cache, attention_mask=mask[rows, :seen]).logits

    alone, both = (MixedCache.from_plan(plan, loaded.config) for _ in range(2))
    exact = unquantized_cache(loaded.config)
    prefill(loaded, alone, prompts[1:])
    own = fed(alone, first[1:], [1])
    assert cache_nbytes(alone) == pytest.approx(predicted_bytes(plan, context, 4), rel=5e-4)

    if name in TWICE:
        with pytest.raises(PolicyError, match="waits for the whole prompt to be scored"):
            [fed(both, ids) for ids in (prompts, first)]
        both = MixedCache.from_plan(plan, loaded.config)
        prefill(loaded, both, prompts)
    else:
        mask[0, :PADDING] = 0
        fed(both, prompts)
    logits = fed(both, first)
    torch.testing.assert_close(logits[1:], own, rtol=1e-5, atol=1e-5)

    fed(exact, prompts)
    padded, other = (logits - fed(exact, first)).abs().mean((1, 2))
    assert 0 < padded < 2 * other

    twin = copy.deepcopy(both)
    twin.reorder_cache(torch.tensor(SWAPPED))
    for cache, rows in ((both, [0, 1]), (twin, SWAPPED)):
        fed(cache, more[rows], rows)
    fed(both, last)
    both.crop(-TAKEN_BACK)
    fed(twin, last[SWAPPED, :-TAKEN_BACK], SWAPPED)
    got, expected = fed(both, first), fed(twin, first[SWAPPED], SWAPPED)
    torch.testing.assert_close(got[SWAPPED], expected, rtol=1e-5, atol=1e-5)

    try:
        both.crop(100 - context)
    except PlanError as error:
        assert "the cache cannot go back to" in str(error)
    else:
        assert fed(both, first).isfinite().all()
