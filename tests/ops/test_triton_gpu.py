"""The Triton kernels on a GPU: what the interpreter cannot run, and what only a launch can show."""

import pytest
import torch
from attending import GPU_RMS, relative_rms
from poisoned import channels, in_a_poisoned_buffer, mask_of, packed, segments, segments_in_tiers, tiers
from reference import dense_attention

pytest.importorskip("triton")
import triton
import triton.language as tl
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.attend import naive as definition
from kvmix_kernels.attend.triton.codes import decode, decode_plainly
from kvmix_kernels.attend.triton.steps import fields_of, share_of, step_of
from kvmix_kernels.pages import Channels, Packed
from kvmix_kernels.quantize import naive, quantize, quantize_into
from kvmix_kernels.segments import Segments
from kvmix_kernels.sorted_tokens import Tiers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = torch.device("cuda")


def to_gpu(stored):
    """The same on the GPU, with the same poison around it."""
    if stored is None:
        return None
    if isinstance(stored, Segments):
        return Segments(to_gpu(stored.sink), to_gpu(stored.packed), to_gpu(stored.tail))
    if isinstance(stored, Packed):
        return Packed(stored.layout, to_gpu(stored.words), to_gpu(stored.scales))
    if isinstance(stored, Channels):
        return Channels(to_gpu(stored.order), stored.pages_per_order, tuple(map(to_gpu, stored.runs)))
    if isinstance(stored, Tiers):
        return Tiers(stored.tier.to(DEVICE), tuple(map(to_gpu, stored.held)), stored.log_weight)
    if not isinstance(stored, torch.Tensor):
        return type(stored)(to_gpu(stored.states))
    if stored._base is None:
        return stored.to(DEVICE)
    return stored._base.to(DEVICE).as_strided(stored.shape, stored.stride(), stored.storage_offset())


def problem_on_gpu(query, key, value, scaling, mask=None, softcap=None, sink_logits=None):
    mask, sink_logits = (None if x is None else x.to(DEVICE) for x in (mask, sink_logits))
    return AttentionProblem(query.to(DEVICE), to_gpu(key), to_gpu(value), scaling, mask, softcap, sink_logits)


@triton.jit
def decode_both(low, high, fast, plain, FIELD: tl.constexpr, LAYOUT: tl.constexpr, STEP: tl.constexpr):
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    at = column[:, None] * STEP + tl.arange(0, STEP)[None, :]
    words, high_words = tl.load(low + at), tl.load(high + at)
    tl.store(fast + at, decode(words, high_words, FIELD, LAYOUT, STEP))
    tl.store(plain + at, decode_plainly(words, high_words, FIELD, LAYOUT, STEP))


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_assembly_and_plain_decoding_agree_on_every_word(bits, page):
    layout = PageLayout("value", bits, 64, page)
    step = step_of(layout)
    words = torch.arange(65536, device=DEVICE).to(torch.int16)
    others = words[torch.randperm(65536, device=DEVICE)]
    for rotation in range(step):  # every word in every place of a step
        low, high = words.roll(rotation), others.roll(rotation)
        for field in range(0, fields_of(layout), share_of(layout, step)):
            fast, plain = (torch.empty(65536, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
            decode_both[(65536 // (64 * step),)](low, high, fast, plain, field, layout, step)
            assert torch.equal(fast, plain)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantizes_bit_for_bit_like_the_reference(kind, bits, head_dim):
    torch.manual_seed(0)
    dtype = DTYPES[(HEAD_DIMS.index(head_dim) + BITS.index(bits)) % 3]  # compiling takes most of the time: a sample
    for group, scale_dtype in ((32, "float16"), (64, "bfloat16"), (128, "float16"), (None, "bfloat16")):
        for spread in (1e-42, 1e-7, 1.0, 1e4):
            layout = PageLayout(kind, bits, head_dim, 128, group, scale_dtype)
            pages = (torch.randn(2, 2, 3, 128, head_dim) * spread).clamp(-3e4, 3e4).to(dtype)
            words, scales = quantize(pages.to(DEVICE), layout)
            expected = naive.quantize(pages, layout)
            assert torch.equal(words.cpu(), expected[0])
            assert torch.equal(scales.cpu().view(torch.int16), expected[1].view(torch.int16))


WIDTHS = (*BITS, 16)


@pytest.mark.parametrize("v_bits", WIDTHS)
@pytest.mark.parametrize("k_bits", WIDTHS)
def test_equals_dense_attention(k_bits, v_bits):
    case = (WIDTHS.index(k_bits) + WIDTHS.index(v_bits)) % 4
    torch.manual_seed(case)
    head_dim, ratio, queries, dtype, masking = [
        (128, 4, 1, torch.bfloat16, None),
        (64, 1, 16, torch.float16, "bool"),
        (80, 16, 3, torch.float32, None),
        (256, 2, 1, torch.bfloat16, "additive"),
    ][case]
    pages, tail = (9, 9 + case % 2), 100 + queries
    tokens = 4 + 128 * max(pages) + tail
    shape = {"head_dim": head_dim, "page": 128, "group": 64, "dtype": dtype, "heads": 2}
    key, value = (
        segments(kind, width, 4, count, tokens - 4 - 128 * count, **shape)
        for kind, width, count in zip(("key", "value"), (k_bits, v_bits), pages, strict=True)
    )
    query = torch.randn(2, 2 * ratio, queries, head_dim).to(dtype)
    scaling, softcap = head_dim**-0.5, [None, 20.0][case % 2]
    mask, logits = mask_of(masking, queries, tokens, 77), torch.randn(2 * ratio)
    plain = [each.read(0, tokens, torch.float32) for each in (key, value)]
    expected = dense_attention(query, *plain, scaling, mask, softcap, logits)
    got, _ = attend(problem_on_gpu(query, key, value, scaling, mask, softcap, logits))
    assert relative_rms(got.cpu(), expected) < GPU_RMS


def same_on_the_gpu(query, key, value, mask=None):
    """Output and logarithms of the GPU are those of the definition in float64."""
    got = attend(problem_on_gpu(query, key, value, 0.1, mask))
    expected = definition.attend(AttentionProblem(query.double(), key, value, 0.1, mask))
    for one, other in zip(got, expected, strict=True):
        assert relative_rms(one.cpu(), other) < GPU_RMS


RUNS = [((16, 16), (32, 4), (80, 2)), ((48, 3), (16, 8)), ((32, 1), (32, 16)), ((16, 16), (16, 4), (16, 2), (16, 1))]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("pages_per_order", [2, 100])
@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_keys_in_runs_of_channels(runs, pages_per_order, queries):
    torch.manual_seed(0)
    head_dim = sum(width for width, _ in runs)
    states = torch.randn(2, 2, 9 * 128, head_dim).bfloat16()
    value = segments("value", 2, 4, 9, 50, head_dim, 128, 64, torch.bfloat16, heads=2)
    key = Segments(value.sink, channels(runs, states, 128, 64, pages_per_order), value.tail)
    same_on_the_gpu(torch.randn(2, 8, queries, head_dim).bfloat16(), key, value)


@pytest.mark.parametrize("masking", [None, "bool"])
@pytest.mark.parametrize("queries", [1, 3])
def test_tokens_in_tiers(queries, masking):
    torch.manual_seed(0)
    tier = tiers([5 * 128, 300], gone=40, heads=2)
    key, value = (
        segments_in_tiers(
            tier,
            [
                packed(torch.randn(2, 2, 5 * 128, 128), PageLayout(kind, 2, 128, 128, 64)),
                in_a_poisoned_buffer(torch.randn(2, 2, 300, 128).bfloat16()),
            ],
            4,
            50,
            128,
            torch.bfloat16,
        )
        for kind in ("key", "value")
    )
    mask = mask_of(masking, queries, key.shape[2], 77)
    same_on_the_gpu(torch.randn(2, 8, queries, 128).bfloat16(), key, value, mask)


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(1, 1), (2, 2), (3, 4), (8, 8), (16, 2), (2, 16)])
def test_small_pages(page, k_bits, v_bits):
    torch.manual_seed(0)
    tokens = 4 + 71 * page + 50
    key, value = (
        segments(kind, bits, 4, count, tokens - 4 - count * page, 128, page, 32, torch.bfloat16, heads=2)
        for kind, bits, count in (("key", k_bits, 71 * (k_bits < 16)), ("value", v_bits, 70 * (v_bits < 16)))
    )
    same_on_the_gpu(torch.randn(2, 8, 1, 128).bfloat16(), key, value)


def test_pages_are_written_where_they_stay():
    layout = PageLayout("key", 3, 80, 64, 32)
    pages = torch.randn(2, 3, 5, 64, 80)[:, ::2, 1:3]
    words = torch.full((2, 2, 7, *layout.words_shape), 12345, dtype=torch.int16, device=DEVICE)
    scales = torch.full((2, 2, 7, *layout.scales_shape), 12345.0, dtype=torch.float16, device=DEVICE)
    quantize_into(pages.to(DEVICE), layout, words[:, :, 4:6], scales[:, :, 4:6])
    for buffer, expected in zip((words, scales), naive.quantize(pages, layout), strict=True):
        assert torch.equal(buffer[:, :, 4:6].cpu(), expected)
        assert (buffer[:, :, [0, 1, 2, 3, 6]] == 12345).all()


def test_the_trials_of_the_kernels_pass():
    from kvmix_kernels.attend.triton import trial as attending
    from kvmix_kernels.quantize import triton as quantizing
    from kvmix_kernels.runtime import gpu

    assert gpu.is_usable(DEVICE)
    assert quantizing.passes_first(DEVICE)
    assert all(attending.passes(kind) for kind in attending.first_kinds(DEVICE))


def test_what_is_not_finite_is_known_without_waiting():
    from kvmix_kernels.quantize.finite import FiniteWatch

    watch = FiniteWatch()
    good, bad = torch.ones(5, device=DEVICE), torch.full((5,), torch.nan, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.watch(good)
        watch.watch(bad)
        watch.watch(good)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.is_bad(wait=True)


def decoding(pages=9, tail=50):
    torch.manual_seed(0)
    shape = {"head_dim": 128, "page": 128, "group": 64, "dtype": torch.bfloat16, "heads": 2}
    key, value = (to_gpu(segments(kind, 2, 4, pages, tail, **shape)) for kind in ("key", "value"))
    query = torch.randn(2, 8, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    return AttentionProblem(query, key, value, scaling=0.1)


def test_a_captured_step_replays():
    problem = decoding()
    attend(problem)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = attend(problem)
    problem.query.copy_(torch.randn_like(problem.query))
    problem.key.packed.words.bitwise_not_()
    graph.replay()
    assert torch.equal(captured, attend(problem)[0])


def test_nothing_waits_for_the_gpu():
    problem = decoding()
    pages = torch.randn(2, 2, 3, 128, 128, device=DEVICE)
    layout = problem.key.packed.layout
    attend(problem)
    quantize(pages, layout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(problem)
        quantize(pages, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generation_with_a_mixed_plan_follows_the_cpu():
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvmix_cli.cache.mixed import MixedCache
    from kvmix_cli.plan import ModelInfo, Plan

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("kvmix")
    plan = Plan.from_short("0:k3v4,1:k2v2", ModelInfo(id="random", layers=2, kv_heads=2, head_dim=64))
    prompt = torch.randint(0, 128, (1, 700))
    logits, pointers = {}, set()
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = MixedCache.from_plan(plan, model.config, reserve=1024)
        steps = []
        with torch.no_grad():
            model(prompt[:, :600].to(device), past_key_values=cache)
            for token in prompt[0, 600:]:
                steps.append(model(token.view(1, 1).to(device), past_key_values=cache).logits.cpu())
                pointers |= {(device, i, store.segments().packed.words.data_ptr())
                             for i, layer in enumerate(cache.layers) for store in layer.stores[:1]}  # fmt: skip
        logits[device] = torch.cat(steps)
    assert relative_rms(logits["cuda"], logits["cpu"].double()) < 2e-2
    assert len(pointers) == 4, "packed keys moved"
