"""Profiles made up for tests, and hypothesis strategies for models, plans and profiles."""

from hypothesis import settings
from hypothesis import strategies as st
from kvmix_kernels.layout import ENCODERS

from kvmix_cli.cache.merging import MERGES
from kvmix_cli.plan import WIDTHS, CacheSettings, LayerPlan, ModelInfo, Plan, TensorPlan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.settings import ENCODES
from kvmix_cli.plan.token_scores import statistics_of
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc
from kvmix_cli.profile import Calibration, LayerScore, Profile, Score, TensorScore

patient = settings(deadline=None, max_examples=50)
"""Hypothesis without a limit on the time of one example: two cores may be shared."""
CALIBRATION = Calibration(source="builtin", sha256="ab", samples=3, seq_len=64, seed=0, tokens=192)


def make_info(layers=8, *, model_id="org/model", stock=None, head_dim=64):
    return ModelInfo(id=model_id, layers=layers, kv_heads=2, head_dim=head_dim, stock=stock or {})


def make_profile(k, v=None, *, info=None, name="grad-norm"):
    """A profile of these means, one for each layer that can be quantized."""
    info = info or make_info(len(k))
    means = zip(info.quantizable, k, k if v is None else v, strict=True)
    layers = {i: LayerScore(k=TensorScore(mean=a, std=a / 10), v=TensorScore(mean=b, std=b / 10)) for i, a, b in means}
    return Profile(model=info, scores={name: Score(seconds=1.5, calibration=CALIBRATION, layers=layers)})


def falling(layers):
    """A profile whose importance falls from layer to layer, and for values rises."""
    return make_profile([float(layers - i) for i in range(layers)], [float(i + 1) for i in range(layers)])


@st.composite
def infos(draw, max_layers=200):
    layers = draw(st.integers(1, max_layers))
    stock = draw(st.sets(st.integers(0, layers - 1), max_size=min(6, layers - 1)))
    kinds = st.sampled_from(["sliding_attention", "linear_attention"])
    return ModelInfo(
        id=draw(st.sampled_from(["org/model", "builtin:tiny", "x", "no", "a: b", "été/1"])),
        revision=draw(st.none() | st.text(max_size=20)),
        layers=layers,
        kv_heads=draw(st.integers(1, 64)),
        head_dim=16 * draw(st.integers(1, 16)),
        config_sha256=draw(st.none() | st.just("ab12")),
        stock={layer: draw(kinds) for layer in sorted(stock)},
    )


@st.composite
def scored(draw, max_layers=200):
    """A profile; few distinct scores, so that there are many ties."""
    info = draw(infos(max_layers))
    source = draw(st.randoms(use_true_random=False))
    k, v = ([float(source.randint(0, 9)) for _ in info.quantizable] for _ in "kv")
    return make_profile(k, v, info=info)


ladders = st.sets(st.sampled_from(WIDTHS), min_size=1).map(lambda widths: tuple(sorted(widths)))
group_sizes = st.sampled_from([8, 32, 64, 100, 128, "row"])
ratios = st.dictionaries(st.sampled_from([1, 2, 3, 4, 8]), st.floats(0, 0.9), max_size=5)
windows = st.builds(Recent, tokens=st.integers(0, 4096)) | st.builds(Rpc, ratio=ratios) | st.just(NoWindow())
settings_ = st.builds(
    CacheSettings,
    page=st.integers(1, 16).map(lambda n: 16 * n),
    sink=st.integers(0, 64),
    group_size=group_sizes,
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
    encode=st.sampled_from(ENCODES),
    window=windows,
)
encoders = st.none() | st.sampled_from(ENCODERS)
tensors = st.builds(TensorPlan, bits=st.sampled_from(WIDTHS), group_size=st.none() | group_sizes, encode=encoders)
layer_plans = st.builds(LayerPlan, k=tensors, v=tensors)


@st.composite
def plans(draw, max_layers=40):
    info = draw(infos(max_layers))
    layers = {layer: draw(layer_plans) for layer in info.quantizable}
    return Plan.build(info, layers, draw(settings_), {"method": "made up", "budget": {"avg_bits": 2.3}})


steps = st.one_of(
    st.builds(Rotate, seed=st.integers(0, 9), matrix=st.none() | st.just("a b/rotation.safetensors")),
    st.builds(Center, means=st.none() | st.just("means.safetensors")),
    st.just(Balance()),
)
transforms = st.builds(Transforms, k=st.lists(steps, max_size=3).map(tuple), v=st.lists(steps, max_size=2).map(tuple))


@st.composite
def token_policies(draw, page):
    """Shares are whole pages of a flush, and something is left for the layer's own bits."""
    pages = draw(st.integers(2, 10))
    parts = draw(st.lists(st.integers(1, pages), max_size=3))
    evicted = draw(st.integers(0, pages))
    while sum(parts) + evicted >= pages:
        parts, evicted = parts[1:], evicted if parts else evicted - 1
    if not parts and not evicted:
        evicted = 1
    widths = st.sampled_from(WIDTHS)
    tiers = tuple(Tier(share=part / pages, k=draw(widths), v=draw(widths)) for part in parts)
    score = draw(st.sampled_from(["attention", "normalised", "recency", "snapkv", "expected-attention"]))
    rules = [rule for rule in MERGES if statistics_of(score).weighs or not MERGES[rule].weighs]
    merge = draw(st.none() | st.sampled_from(rules)) if evicted else None
    more = {"merge": merge, "weigh": bool(evicted) and draw(st.booleans())}
    if evicted and not tiers and draw(st.booleans()):
        more = {"sure": draw(st.sampled_from([0.0, 0.2, 1.0]))}
    images = draw(st.none() | st.sampled_from(["first", "last"]))
    return TokenPolicy(score=score, tiers=tiers, evict=evicted / pages, images=images, flush=pages * page, **more)


@st.composite
def channel_policies(draw, page, head_dim):
    """Runs that leave at least 16 channels of a head of 32 or more."""
    left, runs = head_dim // 16 - 1, []
    while left > 0 and len(runs) < 3:
        width = draw(st.integers(1, left))
        runs.append(ChannelGroup(channels=16 * width, bits=draw(st.sampled_from(WIDTHS))))
        left -= width
        if draw(st.booleans()):
            break
    refresh = page * draw(st.integers(0, 4))
    return ChannelPolicy(score=draw(st.sampled_from(["magnitude", "query-range"])), runs=tuple(runs), refresh=refresh)


@st.composite
def sortings(draw, page, head_dim):
    """Token and channel policies that go together."""
    tokens = draw(st.none() | token_policies(page))
    by_head = tokens is not None and tokens.sure is not None
    return {"tokens": tokens, "channels": None if by_head else draw(st.none() | channel_policies(page, head_dim))}


@st.composite
def composed_plans(draw, max_layers=6):
    """Plans with any of the axes."""
    info = draw(infos(max_layers))
    info = info.model_copy(update={"head_dim": 16 * draw(st.integers(2, 8)), "kv_heads": draw(st.integers(1, 4))})
    cache = draw(settings_)
    axes = {"transforms": draw(st.none() | transforms), **draw(sortings(cache.page, info.head_dim))}
    layers = {layer: draw(layer_plans) for layer in info.quantizable}
    return Plan.build(info, layers, CacheSettings(**{**dict(cache), **axes}), {"method": "made up"})
