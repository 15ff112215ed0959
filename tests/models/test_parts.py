"""A model in parts: what a rank holds of a plan, and what is put back once its part has been loaded."""

import pytest
import torch
from architectures import build
from coding import coded_plan
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.errors import PlanError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.models.parts import ROWWISE, plan_part, whole_sums
from kvmix_cli.models.whole_sums import WholeSums
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.transforms import Rotate, Transforms
from kvmix_cli.ranks import Ranks

RANKS = [Ranks(rank, 2, is_sharded=True) for rank in range(2)]
ROPE = 1 / 10_000 ** (torch.arange(8) / 8)
TOKENS = 80  # more than a frame


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def held(plan, config, given):
    """Keys and values that a cache gives back of all tokens, those of packed pages from their codes."""
    cache = MixedCache.from_plan(plan, config)
    cache.update(*given[..., :-1, :], 0)
    return [handle.dequantize() for handle in cache.update(*given[..., -1:, :], 0)]


@pytest.mark.parametrize("kind", ["coded", 3])
def test_ranks_hold_together_what_one_process_holds(llama, tmp_path, kind):
    plan = coded_plan(llama, tmp_path, k=kind, rope=ROPE)
    heads = plan.model.heads(0)
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(2, 1, heads.kv_heads, TOKENS, heads.key_dim, generator=draw)
    shares = given.chunk(2, dim=2)
    parts = [plan_part(plan, ranks, tmp_path) for ranks in RANKS]
    found = [held(part, llama.config, share) for part, share in zip(parts, shares, strict=True)]
    for whole, *own in zip(held(plan, llama.config, given), *found, strict=True):
        assert torch.equal(torch.cat(own, dim=1), whole)
    assert [part.layers[0].v.widths for part in parts] == [(each,) for each in plan.layers[0].v.widths]


def test_pages_are_the_same_plan_on_every_rank(llama, tmp_path):
    plan = Plan.from_short("0-3:k4v2", model_info(llama.config, "test"))
    assert plan_part(plan, RANKS[1], tmp_path) is plan
    assert not list(tmp_path.iterdir())


def test_a_plan_that_looks_at_all_heads_is_refused(llama, tmp_path):
    cache = CacheSettings(transforms=Transforms(k=(Rotate(),)))
    plan = Plan.from_short("0-3:k4v2", model_info(llama.config, "test"), cache)
    with pytest.raises(PlanError, match="the plan has transforms, which look at all heads of a layer"):
        plan_part(plan, RANKS[0], tmp_path)


def test_styles_of_transformers_are_put_back():
    before = ALL_PARALLEL_STYLES[ROWWISE]
    with pytest.raises(KeyboardInterrupt), whole_sums():
        assert isinstance(ALL_PARALLEL_STYLES[ROWWISE], WholeSums)
        raise KeyboardInterrupt
    assert ALL_PARALLEL_STYLES[ROWWISE] is before
