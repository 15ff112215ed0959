"""Packed caches in files: the same bits after loading, one line for everything that does not fit, prefixes reused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from architectures import build, case
from coding import coded_plan
from composing import AXES, BUDGETS, BY_HEAD, plan_for, quantized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from teaching import ids, teacher_forced

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.saving import CacheFile
from kvmix_cli.errors import CacheError, OutputError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, HeadGeometry, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.page_codecs import PageCodecs
from kvmix_cli.plan.transforms import Center, Rotate, Transforms
from kvmix_cli.plan.windows import Recent, Rpc

PAGE, SINK = 16, 4
AFFINE = {
    "pages": CacheSettings(page=PAGE, sink=SINK, group_size=16, window=Recent(tokens=10)),
    "rows": CacheSettings(page=32, sink=0, group_size="row", scale_dtype="bfloat16", window=Rpc()),
}
CODED = {"coded": {"exact": 2}, "coded keys": {"v": 4, "exact": 1}, "coded values": {"k": 16, "exact": 0}}
ENCODED = {
    "page codecs": {
        "transforms": Transforms(k=(Rotate(),)),
        "codecs": PageCodecs(k="vectors", v="two-axes"),
    }
}
TEXT = ids(400)
ROPE = 1 / 10_000 ** (torch.arange(16) / 16)


def affine(model, cache=AFFINE["pages"]):
    """2-bit keys, 4-bit values, and one layer of each in full precision."""
    info = model_info(model.config, "test")
    widths = [(2, 4), (16, 3), (1, 16), (8, 2)]
    layers = {
        index: LayerPlan(k=TensorPlan(bits=widths[place % 4][0]), v=TensorPlan(bits=widths[place % 4][1]))
        for place, index in enumerate(info.quantizable)
    }
    return Plan.build(info, layers, cache)


def filled(model, plan, tokens, steps):
    cache = MixedCache.from_plan(plan, model.config)
    teacher_forced(model, cache, tokens, steps)
    return cache


def same_bits(one, other):
    """Return whether two files hold the same, byte by byte."""
    return one.read_bytes() == other.read_bytes()


def refused(path, plan, model, **more):
    """The one line that is said about a file."""
    with pytest.raises(CacheError) as caught:
        MixedCache.load(path, plan, model, **more)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama():
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    return model


@pytest.fixture(scope="module")
def plans(llama, tmp_path_factory):
    """Plans of every kind of packing, by name."""
    made = {name: affine(llama, cache) for name, cache in AFFINE.items()}
    made |= {name: plan_for(llama, quantized(name), 2, 4) for name in AXES}
    made |= {name: plan_for(llama, axes, 2, 4) for name, axes in [*BUDGETS.items(), *ENCODED.items()]}
    made["by head"] = plan_for(llama, BY_HEAD, 2, 4)
    return made | {
        name: coded_plan(llama, tmp_path_factory.mktemp("basis"), rope=ROPE, **options)
        for name, options in CODED.items()
    }


@pytest.fixture
def saved(llama, plans, tmp_path):
    """A file of 200 tokens in two rows, by the plan `pages`."""
    tokens = TEXT[:, :200]
    filled(llama, plans["pages"], tokens, [150, 50]).save(tmp_path / "cache.safetensors", tokens, llama)
    return tmp_path / "cache.safetensors"


@pytest.mark.slow
@given(
    plan=st.sampled_from([*AFFINE, *AXES, *BUDGETS, "by head", *CODED, *ENCODED]),
    steps=st.lists(st.sampled_from([1, 3, 17, 40, 90, 150]), min_size=1, max_size=4),
    more=st.integers(1, 90),
    batch=st.integers(1, 2),
)
@example(plan="rows", steps=[150], more=1, batch=1)  # its window is a share of what waits, and packs at every step
@settings(max_examples=25, deadline=None)
def test_every_plan_is_the_same_after_loading(llama, plans, tmp_path_factory, plan, steps, more, batch):
    folder, plan = tmp_path_factory.mktemp("saved"), plans[plan]
    tokens = ids(sum(steps) + more + 1, batch=batch)
    held = tokens[:, : sum(steps)]
    cache = filled(llama, plan, held, steps)
    cache.save(folder / "one", held, llama)
    loaded = MixedCache.load(folder / "one", plan, llama)
    assert loaded.nbytes == cache.nbytes
    loaded.save(folder / "other", held, llama)
    assert same_bits(folder / "one", folder / "other")
    both = [teacher_forced(llama, each, tokens[:, sum(steps) :], [more, 1]) for each in (cache, loaded)]
    torch.testing.assert_close(*both)


FAMILIES = {
    "gemma3": "kvmix",
    "gpt_oss": "kvmix",
    "falcon": None,
    "latent, indexed": "kvmix",
    "wider values": "kvmix",
    "heads by layer": "kvmix",
    "hybrid": "kvmix",
    "linear and full": "sdpa",
}


@pytest.mark.parametrize("family", [case(family) for family in FAMILIES])
def test_every_kind_of_layer_writes_on_alike(family, tmp_path):
    """Sliding windows, recurrent states and indexers' keys included; the answer is that of the cache that was saved."""
    model = build(family, torch.float32)
    if FAMILIES[family] is not None:
        model.set_attn_implementation(FAMILIES[family])
    plan, tokens = affine(model), ids(71)
    cache = filled(model, plan, tokens[:, :70], [50, 20])
    cache.save(tmp_path / "one", tokens[:, :70], model)
    loaded = MixedCache.load(tmp_path / "one", plan, model)
    loaded.save(tmp_path / "other", tokens[:, :70], model)
    assert same_bits(tmp_path / "one", tmp_path / "other")
    assert cache.allocated_bytes >= cache.nbytes == loaded.nbytes
    answers = [model.generate(tokens, past_key_values=each, max_new_tokens=12) for each in (cache, loaded)]
    assert torch.equal(*answers)


@pytest.mark.filterwarnings("ignore:.*does not show its queries")
def test_a_model_that_shows_no_queries_goes_on_after_loading(plans, tmp_path):
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("sdpa")
    tokens = ids(120)
    cache = filled(model, plans["coded"], tokens[:, :119], [119])
    cache.save(tmp_path / "one", tokens[:, :119], model)
    loaded = MixedCache.load(tmp_path / "one", plans["coded"], model)
    both = [teacher_forced(model, each, tokens[:, 119:], [1]) for each in (cache, loaded)]
    torch.testing.assert_close(*both)


def test_loading_maps_the_file_and_never_writes_to_it(llama, plans, saved):
    before = hashlib.sha256(saved.read_bytes()).hexdigest()
    with torch.inference_mode():
        cache = MixedCache.load(saved, plans["pages"], llama)
    buffers = [buffer for layer in cache.layers for store in layer.stores for buffer in store._buffers()]
    views = [buffer.view for buffer in buffers if buffer.nbytes]
    assert sum(view.nbytes for view in views) == cache.nbytes
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(saved))]
    maps = [(*(int(end, 16) for end in line[0].split("-")), line[1]) for line in lines]
    assert all(any(start <= view.data_ptr() < stop for start, stop, _ in maps) for view in views)
    assert {rights for _, _, rights in maps} == {"rw-p"}  # a page that is written to is copied first
    assert not any(view.is_inference() for view in views)
    cache.crop(-3)
    teacher_forced(llama, cache, ids(90), [1, 40, 1, 48])
    assert hashlib.sha256(saved.read_bytes()).hexdigest() == before
    saved.unlink()  # what is mapped stays until the cache is gone
    teacher_forced(llama, cache, ids(1), [1])


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_cut_file_is_refused(llama, plans, whole, share):
    data, path = whole
    path.write_bytes(data[: int(share * len(data))])
    assert "cut short" in refused(path, plans["pages"], llama)


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_of_the_header_is_noticed(llama, plans, whole, place, byte):
    data, path = whole
    header = int.from_bytes(data[:8], "little")
    damaged = bytearray(data)
    at = int(place * (8 + header))
    damaged[at] ^= byte
    path.write_bytes(damaged)
    try:
        same = json.loads(damaged[8 : 8 + header]) == json.loads(data[8 : 8 + header]) and at >= 8
    except ValueError:
        same = False
    if not same:  # white space may differ
        refused(path, plans["pages"], llama)


@pytest.fixture(scope="module")
def whole(llama, plans, tmp_path_factory):
    """A whole file's bytes, and a path for what is made of them."""
    path = tmp_path_factory.mktemp("whole") / "cache.safetensors"
    filled(llama, plans["pages"], ids(60), [60]).save(path, ids(60), llama)
    return path.read_bytes(), path


def test_indices_that_lead_nowhere_are_refused(llama, plans, tmp_path):
    """A kernel would follow them out of its memory."""
    tokens, path = ids(120), tmp_path / "cache.safetensors"
    filled(llama, plans["coded"], tokens, [100, 20]).save(path, tokens, llama)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    held, name = load_file(path), "layers.1.exact.places"
    for place, said in ((1600, "has places up to 1600; expected -1 to 95"), (0, "is not in ascending order")):
        changed = held[name].clone()
        changed[0, 0, -1] = place
        save_file({**held, name: changed}, path, metadata)
        assert f"{name} {said}" in refused(path, plans["coded"], llama)


def test_a_file_has_no_more_in_full_precision_than_the_window_keeps(llama, plans, saved):
    """A prompt leaves its last tokens unpacked, so that they can be taken back; the next token would pack them."""
    tails = [
        store.tail_tokens for layer in MixedCache.load(saved, plans["pages"], llama).layers for store in layer.stores
    ]
    assert set(tails) == {20, 200}  # the window of 10 and what is left of a page; at 16 bits everything


def test_what_a_file_does_not_fit_is_said(llama, plans, saved, tmp_path):
    assert refused(tmp_path / "none", plans["pages"], llama).startswith("there is no cache file")
    assert "cut short, or of another format" in refused(tmp_path, plans["pages"], llama)
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    assert "no cache file of the format kvmix-cache/1" in refused(tmp_path / "x", plans["pages"], llama)
    assert "packed by another plan (checksum" in refused(saved, plans["rows"], llama)
    assert "in float32, and this one is in bfloat16" in refused(saved, plans["pages"], _copy(llama, torch.bfloat16))
    other = _copy(llama)
    with torch.no_grad():
        other.model.layers[2].self_attn.v_proj.weight += 1e-3  # as an adapter would
    assert "with other weights" in refused(saved, plans["pages"], other)
    assert "another configuration" in refused(saved, plans["pages"], build("qwen2", torch.float32))


def test_means_of_a_plan_that_have_changed_are_noticed(llama, tmp_path):
    means, path = tmp_path / "means.safetensors", tmp_path / "cache.safetensors"
    plan = plan_for(llama, {"transforms": Transforms(k=(Center(means=str(means)),))}, 4, 4)
    names, tokens = [f"layers.{index}.k" for index in range(4)], ids(60)
    save_file({name: torch.zeros(2, 32) for name in names}, means)
    filled(llama, plan, tokens, [60]).save(path, tokens, llama)
    save_file({name: torch.ones(2, 32) for name in names}, means)
    assert "means of its plan have changed" in refused(path, plan, llama)


def test_what_cannot_be_saved_leaves_the_file_that_is_there(llama, plans, saved, monkeypatch):
    before = saved.read_bytes()
    cache = MixedCache.load(saved, plans["pages"], llama)
    with pytest.raises(CacheError, match=r"holds 200 tokens of each sequence, and the ids are \[2, 199\]"):
        cache.save(saved, TEXT[:, :199], llama)
    with pytest.raises(CacheError, match="holds no tokens"):
        MixedCache.from_plan(plans["pages"], llama.config).save(saved, TEXT[:, :0], llama)
    with pytest.raises(OutputError, match="cannot write"):
        cache.save(saved / "below a file", TEXT[:, :200], llama)
    cache.layers[2].crop(-1)
    with pytest.raises(CacheError, match=r"cannot be saved: layers.2.keys has 199 tokens; expected 200"):
        cache.save(saved, TEXT[:, :200], llama)
    heads = HeadGeometry(kv_heads=1, key_dim=32, value_dim=32)
    monkeypatch.setattr(type(cache.plan.model), "heads", lambda self, layer: heads)
    with pytest.raises(CacheError, match=r"cannot be saved: layers.0.keys.sink is .* expected torch.float32 \[2, 1"):
        cache.save(saved, TEXT[:, :200], llama)
    assert saved.read_bytes() == before


def test_an_attribute_that_no_file_can_hold_is_named(tmp_path):
    model = build("gemma3", torch.float32)
    cache = filled(model, affine(model), TEXT[:, :40], [40])
    cache.layers[0].tree = object()
    with pytest.raises(CacheError, match=r"layers.0.tree is of type object, which no file holds"):
        cache.save(tmp_path / "cache", TEXT[:, :40], model)


def test_a_longer_prompt_uses_all_of_it(llama, plans, saved):
    longer = torch.cat([TEXT[:, :200], ids(30, seed=1)], dim=1)
    cache = MixedCache.load(saved, plans["pages"], llama, longer)
    assert cache.get_seq_length() == 200
    whole = MixedCache.load(saved, plans["pages"], llama)
    both = [llama.generate(longer, past_key_values=each, max_new_tokens=8) for each in (cache, whole)]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    ("shared", "kept"),
    [(199, 199), (180, 180), (179, 164), (164, 164), (SINK + PAGE, SINK + PAGE), (SINK + PAGE - 1, 0), (0, 0)],
)
def test_a_page_that_holds_other_tokens_is_not_reused(llama, plans, saved, shared, kept):
    """Of 200 tokens, 4 are the sink, 176 are in pages of 16, and the others are in full precision."""
    plan = plans["pages"]
    whole = MixedCache.load(saved, plan, llama)
    prompt = torch.cat([TEXT[:, :shared], (TEXT[:, shared:200] + 1) % 190], dim=1)
    if kept == 0:
        said = refused(saved, plan, llama, ids=prompt)
        assert ("holds another text" if shared == 0 else f"{shared} of its 200 tokens begin the prompt") in said
        return
    cache = MixedCache.load(saved, plan, llama, prompt)
    assert cache.get_seq_length() == kept
    for layer, before in zip(cache.layers, whole.layers, strict=True):
        for read, was in zip((layer.keys, layer.values), (before.keys, before.values), strict=True):
            assert torch.equal(read + 0, was[:, :, :kept])
    assert llama.generate(prompt, past_key_values=cache, max_new_tokens=4).shape == (2, prompt.shape[1] + 4)


def test_a_prompt_that_is_all_there_leaves_its_last_token(llama, plans, saved):
    assert MixedCache.load(saved, plans["pages"], llama, TEXT[:, :200]).get_seq_length() == 199
    assert "holds 2 sequences, and 1 are read" in refused(saved, plans["pages"], llama, ids=TEXT[:, :200][:1])


@pytest.mark.parametrize("axes", ["recency", "everything"])
def test_tiers_are_never_taken_apart(llama, plans, axes, tmp_path):
    path, tokens = tmp_path / "cache", TEXT[:, :200]
    filled(llama, plans[axes], tokens, [150, 50]).save(path, tokens, llama)
    assert "50 of its 200 tokens" in refused(path, plans[axes], llama, ids=torch.cat([tokens[:, :50], tokens], dim=1))


def test_sliding_layers_go_back_only_before_they_slide(tmp_path):
    model = build("gemma3", torch.float32)  # windows of 24 tokens
    plan, path = affine(model), tmp_path / "cache"
    for held, kept in ((23, 10), (40, None)):
        filled(model, plan, TEXT[:, :held], [held]).save(path, TEXT[:, :held], model)
        prompt = torch.cat([TEXT[:, :10], ids(40, seed=1)], dim=1)
        if kept is None:
            assert "sliding" in refused(path, plan, model, ids=prompt)
        else:
            assert MixedCache.load(path, plan, model, prompt).get_seq_length() == kept


def test_the_header_says_what_it_is_of(llama, plans, saved):
    header = CacheFile.open(saved).header
    assert (header.tokens, header.dtype, header.plan_sha256) == (200, "float32", plans["pages"].sha256)
    assert saved.stat().st_size < 1.2 * MixedCache.load(saved, plans["pages"], llama).nbytes + 25_000


def _copy(model, dtype=torch.float32):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()
