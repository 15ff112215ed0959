"""Transforms: what is stored can be restored, attention does not notice, and files that do not fit are refused."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.layout import PageLayout
from kvmix_kernels.quantize import dequantize, quantize
from safetensors.torch import load_file, save_file

from kvmix_cli.cache.transforms import build
from kvmix_cli.cache.transforms.balancing import LIMIT
from kvmix_cli.cache.transforms.rotation import hadamard
from kvmix_cli.errors import PlanError, PolicyError
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms

CPU = torch.device("cpu")
SIZES = [16, 32, 48, 64, 80, 96, 112, 128, 256]
HEADS = [(4, 4), (4, 2), (6, 2), (8, 1)]
CHAINS = st.lists(st.sampled_from([Rotate(seed=7), Center(), Balance()]), min_size=1, max_size=4).map(tuple)
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}
"""Of numbers of size 1, after scores or outputs were taken of them."""
SAME = {"rtol": 1e-9, "atol": 1e-11}
"""Float64 products of different batch sizes: BLAS may sum in another order, which balancing and centering then see."""
SIGNS_OF_SEED_0 = [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, -1, -1]
MEANS = Path(__file__).parents[2] / "examples" / "means.py"


def states(heads, tokens, size, dtype=torch.float64, seed=0, batch=2):
    """Some channels large, some with a mean far from 0, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(heads, 1, size, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(batch, heads, tokens, size, generator=generator, dtype=torch.float64)
    return (noise * 10**channels / 3 + channels.roll(1, -1)).to(dtype)


def chain(steps, kind, size, dtype=torch.float64, layer=0):
    chosen = Transforms(k=steps) if kind == "key" else Transforms(v=steps)
    return build(chosen, kind, layer, size, CPU, dtype)


def scores(query, keys):
    """`[B, H, S, T]` in float64."""
    group = query.shape[1] // keys.shape[1]
    return query.double() @ keys.double().repeat_interleave(group, dim=1).transpose(-1, -2) / math.sqrt(query.shape[-1])


def weigh(weights, values):
    """The output of given attention weights."""
    return weights @ values.double().repeat_interleave(weights.shape[1] // values.shape[1], dim=1)


def centered(scores):
    return scores - scores.mean(-1, keepdim=True)


@pytest.mark.slow
@given(
    steps=CHAINS,
    size=st.sampled_from(SIZES),
    heads=st.sampled_from(HEADS),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_scores_stay_the_same_up_to_a_number_for_each_query(steps, size, heads, dtype, seed):
    query = states(heads[0], 7, size, dtype, seed)
    keys = states(heads[1], 9, size, dtype, seed + 1)
    later = states(heads[1], 5, size, dtype, seed + 2)
    some = chain(steps, "key", size, dtype)
    some.fit(keys, query)
    stored = some.store(torch.cat([keys, later], dim=2))
    asked = some.query(query)
    assert stored.dtype == asked.dtype == dtype
    want, got = scores(query, torch.cat([keys, later], dim=2)), scores(asked, stored)
    assert some.shifts_scores == (Center() in steps)
    if some.shifts_scores:
        want, got = centered(want), centered(got)
    magnitude = scores(query.abs(), torch.cat([keys, later], dim=2).abs()).max()
    spread = scores(asked.abs(), stored.abs()).max()
    assert (want - got).abs().max() <= ROUNDING[dtype] * max(magnitude, spread)


@given(
    steps=CHAINS,
    size=st.sampled_from(SIZES),
    heads=st.sampled_from(HEADS),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_output_of_stored_values_is_that_of_the_values(steps, size, heads, dtype, seed):
    values = states(heads[1], 9, size, dtype, seed)
    some = chain(steps, "value", size, dtype)
    assert not some.needs_queries
    some.fit(values, None)
    weights = states(heads[0], 5, 9, seed=seed).softmax(-1)
    output = some.output(weigh(weights, some.store(values)).to(dtype))
    assert output.dtype == dtype
    assert some.shifts_output == (Center() in steps)
    size_of_it = max(values.double().abs().max(), 1)
    assert (output.double() - weigh(weights, values)).abs().max() <= ROUNDING[dtype] * size_of_it


@given(
    steps=CHAINS,
    kind=st.sampled_from(["key", "value"]),
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_restore_is_the_inverse_of_store(steps, kind, size, dtype, seed):
    prompt, later = (states(2, 9, size, dtype, seed + i) for i in range(2))
    some = chain(steps, kind, size, dtype)
    assert not some.is_fitted
    some.fit(prompt, states(4, 9, size, dtype, seed + 2))
    assert some.is_fitted
    for given_states in (prompt, later):
        back = some.restore(some.store(given_states))
        assert back.dtype == dtype
        size_of_it = given_states.double().abs().max()
        assert (back.double() - given_states.double()).abs().max() <= ROUNDING[dtype] * size_of_it


@given(steps=CHAINS, kind=st.sampled_from(["key", "value"]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_state_goes_with_the_batch(steps, kind, seed):
    prompt, query = states(2, 9, 48, seed=seed, batch=3), states(4, 9, 48, seed=seed + 1, batch=3)
    chosen = torch.tensor([2, 0, 0, 1])
    together, apart = chain(steps, kind, 48), chain(steps, kind, 48)
    together.fit(prompt, query)
    together.apply(lambda tensor: tensor.index_select(0, chosen))
    apart.fit(prompt[chosen], query[chosen])
    for one, other in zip(together.tensors(), apart.tensors(), strict=True):
        torch.testing.assert_close(one, other, **SAME)
    assert all(tensor.shape == (4, 2, 1, 48) for tensor in together.tensors())
    assert len(together.tensors()) == sum(not isinstance(step, Rotate) for step in steps)
    for function in ("store", "query", "output"):
        given_states = prompt[chosen] if function == "store" else query[chosen]
        torch.testing.assert_close(
            getattr(together, function)(given_states), getattr(apart, function)(given_states), **SAME
        )


def test_no_transforms_are_an_empty_chain_that_does_nothing():
    given_states = states(2, 9, 64, torch.bfloat16)
    for some in (build(None, "key", 0, 64, CPU, torch.bfloat16), chain((), "value", 64, torch.bfloat16)):
        assert not some
        assert some.is_fitted
        assert some.tensors() == []
        assert not (some.needs_queries or some.shifts_scores or some.shifts_output)
        for function in (some.store, some.restore, some.query, some.output):
            assert function(given_states) is given_states
    assert chain((Rotate(),), "key", 64)


def test_steps_learn_from_what_the_steps_before_them_have_made():
    keys, query = states(2, 30, 64), states(4, 30, 64, seed=1)
    some = chain((Center(), Rotate(), Balance()), "key", 64)
    some.fit(keys, query)
    stored, asked = some.store(keys), some.query(query)
    largest = asked.abs().amax(2).unflatten(1, (2, 2)).amax(2)
    assert torch.allclose(stored.abs().amax(2), largest), "balanced: keys and queries are of the same size"
    assert torch.allclose(some.steps[2].restore(stored).mean(2), torch.zeros(2, 2, 64).double(), atol=1e-12)


def test_what_is_learned_from_a_prompt_is_32_bits_a_channel_and_carries_no_gradient():
    keys = states(2, 9, 64, torch.bfloat16).requires_grad_()
    query = states(4, 9, 64, torch.bfloat16).requires_grad_()
    some = chain((Balance(), Center()), "key", 64, torch.bfloat16)
    some.fit(keys, query)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in some.tensors())
    assert some.query(query).requires_grad


@pytest.mark.parametrize("step", [Center(), Balance()])
def test_nothing_is_stored_before_a_prompt_was_seen(step):
    with pytest.raises(RuntimeError, match="no prompt yet"):
        chain((step,), "value", 64).store(states(2, 9, 64))


@given(size=st.integers(1, 260), seed=st.integers(0, 2**70))
@settings(max_examples=60, deadline=None)
def test_a_hadamard_matrix_of_any_size_is_orthogonal_and_flat(size, seed):
    matrix = hadamard(size, seed, CPU, torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-12
    if size & (size - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-12)


def test_hadamard_matrices_are_shared_and_a_seed_means_the_same_everywhere():
    first, second, other = (chain((Rotate(seed=seed),), "key", 64, torch.float32) for seed in (3, 3, 4))
    assert first.steps[0]._matrix is second.steps[0]._matrix
    assert not torch.equal(first.steps[0]._matrix, other.steps[0]._matrix)
    signs = hadamard(16, 0, CPU, torch.float64)[:, 0].sign().int().tolist()
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        hadamard.cache_clear()
        assert hadamard(16, 0, CPU, torch.float64)[:, 0].sign().int().tolist() == signs
    assert signs == SIGNS_OF_SEED_0


def test_one_large_channel_is_spread_over_all():
    keys = torch.zeros(1, 1, 3, 96, dtype=torch.float64)
    keys[..., 5] = 100
    keys[..., 6] = torch.tensor([1.0, -1.0, 0.5])
    stored = chain((Rotate(),), "key", 96).store(keys)
    assert stored.abs().max() <= 101 * math.sqrt(2 / 96)
    common = torch.ones(1, 1, 1, 64, dtype=torch.float64)
    assert chain((Rotate(),), "key", 64).store(common).abs().max() < 5, (
        "a mean common to all channels is not gathered in one"
    )


def test_matrices_that_were_made_in_inference_mode_can_be_trained_through():
    hadamard.cache_clear()
    with torch.inference_mode():
        some = chain((Rotate(seed=11),), "key", 64)
    query = states(4, 3, 64).requires_grad_()
    some.query(query).square().sum().backward()
    assert torch.allclose(query.grad, 2 * query)


def test_balanced_keys_are_those_of_the_formula():
    """MiKV: b = sqrt(max |q| / max |k|), over the prompt and over the query heads of a group."""
    keys, query = states(2, 30, 64), states(6, 30, 64, seed=1)
    some = chain((Balance(),), "key", 64)
    assert some.needs_queries
    some.fit(keys, query)
    for head in range(2):
        largest = query[0, 3 * head : 3 * head + 3].abs().amax((0, 1))
        want = (largest / keys[0, head].abs().amax(0)).sqrt()
        assert torch.allclose(some.store(keys)[0, head], keys[0, head] * want)
        assert torch.allclose(some.query(query)[0, 3 * head + 1], query[0, 3 * head + 1] / want)


def test_balanced_values_are_those_of_the_formula():
    """ZipCache: c = sqrt(max |v|)."""
    values = states(2, 30, 64)
    some = chain((Balance(),), "value", 64)
    some.fit(values, None)
    assert torch.allclose(some.store(values), values / values.abs().amax(2, keepdim=True).sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("odd", [0.0, math.nan, math.inf, -math.inf])
def test_channels_without_a_usable_maximum_are_left_alone(dtype, odd):
    keys, query = states(2, 9, 64, dtype), states(4, 9, 64, dtype, seed=1)
    keys[:, :, :, 3], query[:, :, :, 4] = odd, odd
    for kind in ("key", "value"):
        some = chain((Balance(),), kind, 64, dtype)
        some.fit(keys, query)
        (scale,) = some.tensors()
        assert scale.isfinite().all()
        assert (scale[..., 3] == 1).all()
        assert kind == "value" or (scale[..., 4] == 1).all()
        assert (scale[..., 5] != 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_grows_after_the_prompt_does_not_overflow(dtype):
    keys, query = states(2, 9, 64, dtype), states(4, 9, 64, dtype, seed=1)
    keys[..., 3], query[..., 3] = 1e-7, 100
    keys[..., 4], query[..., 4] = 100, 1e-7
    later = torch.full_like(keys, 100)
    for kind in ("key", "value"):
        some = chain((Balance(),), kind, 64, dtype)
        some.fit(keys, query)
        (scale,) = some.tensors()
        assert scale.min() >= 1 / LIMIT
        assert scale.max() <= LIMIT
        for result in (some.store(later), some.query(later.repeat(1, 2, 1, 1)), some.output(later.repeat(1, 2, 1, 1))):
            assert result.isfinite().all()
    keys_of_all_sizes = torch.logspace(-7, 4, 64).expand(2, 2, 9, 64).to(dtype)
    some = chain((Balance(),), "value", 64, dtype)
    some.fit(keys_of_all_sizes, None)
    assert some.store(keys_of_all_sizes).isfinite().all()


def error(steps, kind, given_states, query):
    """Mean square error of what 2 bits leave of it."""
    layout = PageLayout(kind, 2, head_dim=64, page=32, group_size=32)
    some = chain(steps, kind, 64)
    some.fit(given_states, query)
    words, scales = quantize(some.store(given_states).unflatten(2, (-1, 32)), layout)
    back = some.restore(dequantize(words, scales, layout).flatten(2, 3).double())
    return (back - given_states).square().mean().item()


def test_what_transforms_can_change_depends_on_where_groups_lie():
    """As docs/transforms.md says: a group of keys lies within a channel, a group of values across channels."""
    given_states, query = states(2, 64, 64), states(4, 64, 64, seed=1)

    def ratio(kind, *steps, to=()):
        return error(steps, kind, given_states, query) / error(to, kind, given_states, query)

    rotated = (Rotate(),)
    for steps, to in [((Center(),), ()), ((Balance(),), ()), ((Center(), Rotate()), rotated)]:
        assert ratio("key", *steps, to=to) == pytest.approx(1, rel=0.001), "but for the rounding of scales and zeros"
    for steps in [(Balance(), Rotate()), (Center(), Balance(), Rotate())]:
        assert abs(ratio("key", *steps, to=rotated) - 1) > 0.02
    assert ratio("value", Center()) < 0.9
    assert ratio("value", Balance()) < 0.9


def test_an_infinite_number_stays_where_it_is_when_the_mean_is_taken():
    keys = states(2, 9, 64)
    keys[0, 0, 3, 5] = math.nan
    some = chain((Center(),), "key", 64)
    some.fit(keys, None)
    assert some.store(keys).isnan().sum() == 1


def test_keys_cannot_be_balanced_where_nobody_sees_the_queries():
    with pytest.raises(PolicyError, match=r"layer 3 keys cannot be balanced.*take `balance` out"):
        chain((Rotate(), Balance()), "key", 64, layer=3).fit(states(2, 9, 64), None)


def orthogonal(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
        0
    ]


def write(path, **tensors):
    save_file({name.replace("_", "."): tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_rotation_from_a_file_is_orthogonal_whatever_it_is_stored_in(tmp_path, dtype):
    path = write(tmp_path / "r.safetensors", rotation=orthogonal(128).to(dtype))
    keys, query = states(2, 9, 128), states(4, 9, 128, seed=1)
    some = chain((Rotate(matrix=path),), "key", 128)
    some.fit(keys, query)
    assert torch.allclose(scores(some.query(query), some.store(keys)), scores(query, keys), atol=1e-12)
    assert torch.allclose(some.store(keys), keys @ orthogonal(128), atol={torch.bfloat16: 0.3}.get(dtype, 0.03))
    assert chain((Rotate(matrix=path),), "value", 128, layer=1).steps[0]._matrix is some.steps[0]._matrix


def test_a_layers_own_matrix_comes_before_that_of_all(tmp_path):
    own, common = orthogonal(16, 1), orthogonal(16, 2)
    path = write(tmp_path / "r.safetensors", layers_3_k=own, rotation=common)
    keys = states(2, 9, 16)
    assert torch.allclose(chain((Rotate(matrix=path),), "key", 16, layer=3).store(keys), keys @ own)
    assert torch.allclose(chain((Rotate(matrix=path),), "key", 16, layer=2).store(keys), keys @ common)
    assert torch.allclose(chain((Rotate(matrix=path),), "value", 16, layer=3).store(keys), keys @ common)


def test_a_file_that_changes_is_read_again(tmp_path):
    keys = states(2, 9, 16)
    for seed in range(2):
        path = write(tmp_path / "r.safetensors", rotation=orthogonal(16, seed))
        assert torch.allclose(chain((Rotate(matrix=path),), "key", 16).store(keys), keys @ orthogonal(16, seed))


BAD = [
    ({"layers_3_v": orthogonal(16)}, "has no 'layers.3.k' or 'rotation'.*made for this model"),
    ({"rotation": orthogonal(32)}, r"'rotation' of .* must be \[16, 16\] for this model, but is \[32, 32\]"),
    ({"rotation": torch.ones(16)}, r"must be \[16, 16\] for this model, but is \[16\]"),
    ({"rotation": torch.full((16, 16), math.nan)}, "not all finite"),
    ({"rotation": 1.1 * orthogonal(16)}, r"not orthogonal: R R\^T differs from the identity by up to 0.21,"),
    ({"layers_3_k": torch.zeros(16, 16)}, "'layers.3.k' of .* not orthogonal.* by up to 1,"),
    ({"rotation": orthogonal(16).to(torch.complex64)}, "not all finite"),
]


@pytest.mark.parametrize(("tensors", "fault"), BAD)
def test_rotations_that_do_not_fit_are_refused_in_one_line(tmp_path, tensors, fault):
    path = write(tmp_path / "r.safetensors", **tensors)
    with pytest.raises(PlanError, match=fault) as raised:
        chain((Rotate(matrix=path),), "key", 16, layer=3)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "there is no file"), (b"", "cannot read"), (b"x" * 100, "cannot read"), ("folder", "cannot read")],
)
@pytest.mark.parametrize("step", [lambda path: Rotate(matrix=path), lambda path: Center(means=path)])
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, step, content, fault):
    path = tmp_path / "r.safetensors"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=fault) as raised:
        chain((step(str(path)),), "value", 16)
    assert "\n" not in str(raised.value)


def test_means_from_a_file_are_the_same_for_every_sequence_and_no_state(tmp_path):
    means = torch.randn(2, 16, dtype=torch.float64)
    path = write(tmp_path / "means.safetensors", layers_3_k=means, layers_3_v=means.clone())
    given_states = states(2, 9, 16, batch=3)
    for kind in ("key", "value"):
        some = chain((Center(means=path),), kind, 16, layer=3)
        some.fit(given_states, None)
        assert some.tensors() == []
        assert torch.equal(some.store(given_states), given_states - means[:, None])
        some.apply(lambda tensor: tensor[:1])
        assert torch.equal(
            some.output(torch.zeros(1, 4, 1, 16)).double()[0, :, 0], means.float().double()[[0, 0, 1, 1]]
        )


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"layers_2_k": torch.zeros(2, 16)}, "has no 'layers.3.k'"),
        ({"layers_3_k": torch.zeros(2, 32)}, r"must be \[H_kv, 16\] for this model, but is \[2, 32\]"),
        ({"layers_3_k": torch.full((2, 16), math.inf)}, "not all finite"),
        ({"layers_3_k": torch.zeros(4, 16)}, "has 4 KV heads and the model 2"),
    ],
)
def test_means_that_do_not_fit_are_refused(tmp_path, tensors, fault):
    path = write(tmp_path / "means.safetensors", **tensors)
    with pytest.raises(PlanError, match=fault):
        chain((Center(means=path),), "key", 16, layer=3).fit(states(2, 9, 16), None)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("means", MEANS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_writes_means_that_a_plan_can_name(tmp_path, example):
    """examples/means.py, against the keys of one forward pass."""
    path = tmp_path / "means.safetensors"
    example.main(["builtin:tiny", str(path), "--samples", "2", "--length", "64"])
    written = load_file(path)
    assert set(written) == {f"layers.{layer}.{side}" for layer in range(8) for side in "kv"}
    assert all(tensor.shape == (2, 64) and tensor.dtype == torch.float32 for tensor in written.values())
    loaded = load_model("builtin:tiny", device="cpu")
    keys = [layer.keys for layer in example.prompt(loaded, list(range(10, 50))).layers]
    stored, given = 0.0, 0.0
    for layer in range(8):
        some = chain((Center(means=str(path)),), "key", 64, torch.float32, layer)
        some.fit(keys[layer], None)
        stored += some.store(keys[layer]).square().mean().item()
        given += keys[layer].square().mean().item()
    assert stored < 0.9 * given


def test_means_of_several_texts_count_every_token_once(example):
    loaded = load_model("builtin:tiny", device="cpu")
    texts = [list(range(10, 50)), list(range(100, 120))]
    keys = [example.prompt(loaded, ids).layers[2].keys[0] for ids in texts]
    assert torch.allclose(example.means(loaded, texts)["layers.2.k"], torch.cat(keys, dim=1).mean(1), atol=1e-5)
