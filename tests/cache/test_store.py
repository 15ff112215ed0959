"""One store: what is packed when, what is copied, and that a rollback leaves no trace."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.layout import PageLayout

from kvmix_cli.cache.buffer import Buffer
from kvmix_cli.cache.packing.pages import PagePacking
from kvmix_cli.cache.store import ROLLBACK, Store
from kvmix_cli.errors import QuantizationError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc

WINDOWS = [Recent(tokens=0), Recent(tokens=20), Recent(tokens=128), Rpc(), NoWindow()]


def store(window=WINDOWS[1], bits=4, sink=4, page=16, reserve=0):
    layout = None if bits == 16 else PageLayout("key", bits, head_dim=16, page=page, group_size=None)
    settings = CacheSettings(page=page, sink=sink, window=window)
    packing = layout and PagePacking("layer 0 keys", layout, max(0, reserve - sink) // page)
    return Store(packing, settings, bits, reserve)


def tokens(count, seed=0):
    return torch.randn(1, 2, count, 16, generator=torch.Generator().manual_seed(seed))


def append(some, new):
    """Do what one forward does to a store, and return what it sees."""
    some.settle()
    seen = some.add(new)
    some.pack_early()
    return seen


def state(some):
    segments = some.segments()
    return segments.sinks, segments.packed_tokens, segments.dequantize()


@pytest.mark.slow
@given(
    window=st.sampled_from(WINDOWS),
    sink=st.sampled_from([0, 4]),
    steps=st.lists(st.tuples(st.integers(1, 200), st.integers(0, ROLLBACK)), min_size=1, max_size=8),
)
@settings(max_examples=120, deadline=None)
def test_taking_back_part_of_the_last_forward_leaves_no_trace(window, sink, steps):
    rolled_back, straight = store(window, sink=sink), store(window, sink=sink)
    for seed, (count, back) in enumerate(steps):
        back = min(back, count)
        new = tokens(count, seed)
        seen = append(rolled_back, new)
        assert torch.equal(seen.dequantize()[:, :, -count:], new)
        rolled_back.crop(back)
        if count > back:
            append(straight, new[:, :, : count - back])
    final = tokens(1, 99)
    seen = [append(some, final) for some in (rolled_back, straight)]
    assert seen[0].packed_tokens == seen[1].packed_tokens
    assert torch.equal(seen[0].dequantize(), seen[1].dequantize())


@given(window=st.sampled_from(WINDOWS), counts=st.lists(st.integers(1, 150), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_exactly_what_the_window_does_not_keep_is_packed(window, counts):
    some, already = store(window), 0
    for seed, count in enumerate(counts):
        seen = append(some, tokens(count, seed))
        packed = seen.packed_tokens - already
        before = max(0, seen.shape[2] - count - seen.sinks - seen.packed_tokens + packed)
        assert packed == max(0, before - window.keep(before, 4)) // 16 * 16
        already = seen.packed_tokens
    assert some.length == sum(counts)


def test_pages_are_packed_once_and_never_move_while_there_is_room():
    some = store(reserve=1000)
    append(some, tokens(300))
    first = some.segments().packed
    kept = first.words.clone()
    for seed in range(200):
        append(some, tokens(1, seed))
    last = some.segments().packed
    assert last.pages > first.pages
    assert last.words.data_ptr() == first.words.data_ptr()
    assert torch.equal(last.words[:, :, : first.pages], kept)


def test_growth_is_amortised(monkeypatch):
    moved = []
    move = Buffer._moved
    monkeypatch.setattr(Buffer, "_moved", lambda self, *args: moved.append(self.length) or move(self, *args))
    some = store(bits=16)
    for seed in range(2000):
        append(some, tokens(1, seed))
    assert sum(moved) < 6 * 2000
    assert some.allocated_bytes <= 1.25 * some.nbytes + 2 * 16 * 4 * 2


def test_a_long_prompt_is_packed_at_once():
    some = store()
    seen = append(some, tokens(1000))
    assert seen.packed_tokens == 0
    assert some.packed_tokens > 1000 - 4 - 20 - ROLLBACK - 2 * 16
    assert some.allocated_bytes < tokens(1000).nbytes / 3


def test_reserve_allocates_once_and_no_more_than_needed():
    some = store(reserve=516)
    append(some, tokens(400))
    held = some.segments().packed.words.data_ptr()
    for seed in range(100):
        append(some, tokens(1, seed))
    assert some.segments().packed.words.data_ptr() == held
    at_most = 2 * 16 * 4 * (20 + 16 + ROLLBACK + 16)
    assert some.allocated_bytes - some.nbytes < at_most


def test_cropping_into_packed_pages_keeps_what_they_decode_to():
    some = store(WINDOWS[0], sink=4)
    append(some, tokens(400))
    append(some, tokens(1))
    before = some.segments().dequantize()
    some.crop(200)
    assert some.length == 201
    assert torch.equal(some.segments().dequantize(), before[:, :, :201])
    some.crop(198)
    assert torch.equal(some.segments().dequantize(), before[:, :, :3])
    some.crop(50)
    assert some.length == 0
    append(some, tokens(30, 5))
    assert torch.equal(some.segments().dequantize(), tokens(30, 5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_are_named_with_their_layer(bad):
    new = tokens(300)
    new[0, 1, 50, 3] = bad
    with pytest.raises(QuantizationError, match="layer 0 keys: NaN or Inf"):
        append(store(), new)


def test_values_beyond_float16_say_what_to_do():
    with pytest.raises(QuantizationError, match=r"layer 0 keys: values up to .*`scale_dtype: bfloat16`"):
        append(store(), tokens(300) * 1e6)


def test_batch_changes_apply_to_every_part():
    some = store()
    append(some, torch.cat([tokens(300, seed) for seed in range(3)]))
    before = some.segments().dequantize()
    some.apply(lambda x: x[torch.tensor([2, 0])])
    assert torch.equal(some.segments().dequantize(), before[[2, 0]])


CHANGES = {
    "append": lambda buffer: buffer.append(tokens(3, 7)),
    "drop_first": lambda buffer: buffer.drop_first(2),
    "truncate": lambda buffer: buffer.truncate(4),
    "hold": lambda buffer: buffer.hold(tokens(5, 8)),
    "select": lambda buffer: buffer.select(torch.tensor([[[4, 1], [0, 2]]])),
    "apply": lambda buffer: buffer.apply(lambda x: x.neg()),
}
CONTENTS = {
    "append": lambda x: torch.cat([x, tokens(3, 7)], dim=2),
    "drop_first": lambda x: x[:, :, 2:],
    "truncate": lambda x: x[:, :, :4],
    "hold": lambda x: tokens(5, 8),
    "select": lambda x: torch.stack([x[0, 0, [4, 1]], x[0, 1, [0, 2]]])[None],
    "apply": torch.neg,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_view_is_one_object_until_the_buffer_changes(change):
    buffer = Buffer()
    buffer.append(tokens(6))
    view, before = buffer.view, buffer.view.clone()
    assert buffer.view is view
    CHANGES[change](buffer)
    assert buffer.view is not view
    assert torch.equal(buffer.view, CONTENTS[change](before))


def test_a_step_that_packs_nothing_reads_the_same_pages():
    some = store()
    append(some, tokens(300))
    packed = append(some, tokens(1)).packed
    assert packed.tokens == 272
    assert all(append(some, tokens(1, seed)).packed is packed for seed in range(3))
    append(some, tokens(20))
    assert append(some, tokens(1)).packed is not packed


def test_paper_window_collapses_as_in_the_released_code():
    """A 4096-token prompt leaves 832 -> 193 -> 66 -> 35 tokens at 20 % (see docs/method.md)."""
    some = store(Rpc(), bits=4, sink=0, page=32)
    append(some, tokens(4096))
    lengths = []
    for seed in range(4):
        seen = append(some, tokens(1, seed))
        lengths.append(seen.tail.shape[2] - 1)
    assert lengths == [832, 193, 66, 35]


def test_a_long_prompt_is_not_kept_in_full_precision_once_it_is_packed():
    some = store()
    prompt = weakref.ref(some.add(tokens(500)).tail)
    assert prompt() is not None
    some.pack_early()
    assert prompt() is None
