"""Plans with transforms, tiers and channel groups."""

from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms
from kvmix_cli.plan.windows import Recent

CENTERED = Transforms(k=(Center(),), v=(Center(),))
AXES = {
    "rotated": {"transforms": Transforms(k=(Rotate(),), v=(Rotate(seed=1),))},
    "balanced": {"transforms": Transforms(k=(Balance(),), v=(Balance(),))},
    "centered": {"transforms": CENTERED},
    "all of them": {"transforms": Transforms(k=(Center(), Balance(), Rotate()), v=(Balance(), Rotate(), Center()))},
    "attention": {"tokens": TokenPolicy(tiers=(Tier(share=0.2, k=16, v=16),), flush=80)},
    "normalised": {
        "tokens": TokenPolicy(
            score="normalised", tiers=(Tier(share=0.2, k=16, v=16), Tier(share=0.4, k=16, v=16)), flush=80
        )
    },
    "recency": {"tokens": TokenPolicy(score="recency", tiers=(Tier(share=0.5, k=16, v=16),), flush=32)},
    "last queries": {"tokens": TokenPolicy(score="snapkv", tiers=(Tier(share=0.2, k=16, v=16),), flush=80)},
    "before rope": {
        "tokens": TokenPolicy(score="leverage", tiers=(Tier(share=0.2, k=16, v=16),), flush=80, granularity=8)
    },
    "queries to come": {
        "transforms": Transforms(k=(Rotate(),)),
        "tokens": TokenPolicy(score="expected-attention", tiers=(Tier(share=0.2, k=16, v=16),), flush=80),
    },
    "query-range": {"channels": ChannelPolicy(runs=(ChannelGroup(channels=16, bits=16),))},
    "everything": {
        "transforms": Transforms(k=(Rotate(), Balance()), v=(Rotate(),)),
        "tokens": TokenPolicy(tiers=(Tier(share=0.2, k=16, v=16),), flush=80),
        "channels": ChannelPolicy(score="magnitude", runs=(ChannelGroup(channels=16, bits=16),), refresh=32),
    },
}

BUDGETS = {
    "budget": {"tokens": TokenPolicy(keep=4 + 10 + 64, flush=32)},
    "budget of the prompt": {"tokens": TokenPolicy(score="recency", keep=4 + 10 + 32, when="prompt", flush=32)},
}
"""Numbers of tokens to keep; they drop some of what the tests feed."""
BY_HEAD = {"tokens": TokenPolicy(score="snapkv", evict=0.5, sure=0.2, flush=64)}
"""Half of the tokens, of which every KV head keeps a number of its own."""


def plan_for(model, axes, k=16, v=16, sink=4):
    info = model_info(model.config, "test")
    cache = CacheSettings(page=16, sink=sink, group_size=16, window=Recent(tokens=10), **axes)
    layer = LayerPlan(k=TensorPlan(bits=k), v=TensorPlan(bits=v))
    return Plan.build(info, dict.fromkeys(info.quantizable, layer), cache)


def quantized(axes):
    """Return the same axes with fewer bits in tiers and channel groups."""
    axes = dict(AXES[axes])
    if policy := axes.get("tokens"):
        tiers = tuple(Tier(share=tier.share, k=8, v=4) for tier in policy.tiers)
        axes["tokens"] = policy.model_copy(update={"tiers": tiers})
    return axes
