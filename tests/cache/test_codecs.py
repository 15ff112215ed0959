"""Page codecs: against float64 definitions, their bytes, and caches that store pages in them."""

from itertools import product

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.layout import BITS
from kvmix_kernels.runtime.native import library

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.packing.encoded import CodecPacking
from kvmix_cli.codecs import CODECS, PageCodec, StoredPart
from kvmix_cli.codecs.levels import gaussian_levels
from kvmix_cli.codecs.packed import pack, unpack
from kvmix_cli.codecs.vectors import gaussian_codebook
from kvmix_cli.errors import PlanError, QuantizationError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.page_codecs import PageCodecs
from kvmix_cli.plan.transforms import Rotate, Transforms
from kvmix_cli.plan.windows import Recent

KINDS = [(name, kind) for name, kind in product(CODECS, ("key", "value")) if (name, kind) != ("token-norm", "value")]
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Squared errors of Lloyd-Max quantizers of a standard normal distribution (Max 1960, table 1)."""


def codec_of(name, kind="key", bits=2, head_dim=32, page=48, group_size=20):
    return CODECS[name](kind, bits, head_dim, page, group_size)


def pages_of(codec, *batch, seed=0):
    return torch.randn(*batch, codec.page, codec.head_dim, generator=torch.Generator().manual_seed(seed))


def error_of(codec, pages):
    return ((codec.decode(codec.encode(pages)) - pages) ** 2).mean().item()


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 8), octets=st.integers(1, 9), seed=st.integers(0, 99))
def test_packed_codes_come_back_and_take_their_bits(width, octets, seed):
    codes = torch.randint(1 << width, (2, 3, 8 * octets), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, width)
    assert packed.shape == (2, 3, octets * width)
    assert torch.equal(unpack(packed, width, 8 * octets).long(), codes)


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_parts_have_the_bytes_that_are_counted(name, kind, bits):
    codec = codec_of(name, kind, bits)
    parts = codec.encode(pages_of(codec, 2, 3))
    assert {key: tuple(part.shape) for key, part in parts.items()} == {
        key: (2, 3, *part.shape) for key, part in codec.parts.items()
    }
    assert sum(part.nbytes for part in parts.values()) == 6 * codec.nbytes


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_more_bits_lose_less_and_a_page_of_zeros_stays(name, kind):
    errors = [error_of(codec, pages_of(codec, 4)) for codec in (codec_of(name, kind, bits) for bits in BITS)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    codec = codec_of(name, kind)
    assert error_of(codec, torch.zeros(1, codec.page, codec.head_dim)) == 0


def test_stored_bits():
    """A scale a token and head is 16 / D; scale and zero of groups, and a number a column, 32 / G + 16 / rows."""
    for name in ("symmetric", "lloyd-max", "vectors"):
        assert CODECS[name]("key", 2, 64, 128).stored_bits == 2 + 16 / 64
    assert CODECS["token-norm"]("key", 2, 64, 128, 64).stored_bits == 2 + 32 / 64 + 16 / 64
    assert CODECS["two-axes"]("value", 2, 64, 128, 32).stored_bits == 2 + 32 / 32 + 16 / 128


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_gaussian_levels_are_those_of_the_literature(bits):
    levels = gaussian_levels(bits)
    sample = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    nearest = (sample[:, None] - levels).abs().argmin(-1)
    assert ((levels[nearest] - sample) ** 2).mean() == pytest.approx(LLOYD_MAX[bits], rel=0.03)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-5)


def test_vectors_lose_less_than_the_best_levels_at_the_same_bits():
    pages = {
        name: error_of(codec, pages_of(codec, 40)) for name in ("vectors", "lloyd-max") if (codec := codec_of(name))
    }
    assert pages["vectors"] < 0.9 * pages["lloyd-max"]
    assert gaussian_codebook(4, 8).shape == (256, 4)


def best_levels(states, levels, scales):
    """The least squared error of each token over many scales, in float64, with the nearest of all levels."""
    wide = states.double()[..., None, :] / scales[..., :, None]
    nearest = levels.double()[(wide[..., None] - levels.double()).abs().argmin(-1)]
    return ((nearest * scales[..., :, None] - states.double()[..., None, :]) ** 2).sum(-1).amin(-1)


@pytest.mark.parametrize(("name", "most"), [("symmetric", 1.12), ("lloyd-max", 1.3)])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_scales_of_levels_are_near_the_best_there_are(name, bits, most):
    codec = codec_of(name, bits=bits, page=16)
    pages = pages_of(codec, 1)
    decoded = codec.decode(codec.encode(pages))
    spread = pages.double().square().mean(-1, keepdim=True).sqrt() * torch.linspace(0.02, 3, 300, dtype=torch.float64)
    best = best_levels(pages, codec.levels, spread)
    assert best.sum() <= ((decoded - pages) ** 2).sum() * 1.001 <= most * best.sum()


def two_axes(matrix, columns, scale, zero, group, most):
    """The definition in float64: codes nearest to `(m / a - zero) / scale`, and what they stand for."""
    spread = [each.double().repeat_interleave(group, dim=-1)[..., : matrix.shape[-1]] for each in (scale, zero)]
    wide = matrix.double() / columns.double()[..., None, :]
    codes = ((wide - spread[1]) / spread[0]).round().clamp(0, most)
    return (codes * spread[0] + spread[1]) * columns.double()[..., None, :]


@pytest.mark.parametrize(("name", "kind"), [pair for pair in KINDS if pair[0] in ("token-norm", "two-axes")])
def test_two_axes_are_their_definition(name, kind):
    codec = codec_of(name, kind)
    pages = pages_of(codec, 2)
    parts = codec.encode(pages)
    matrix = pages.mT if kind == "key" else pages
    expected = two_axes(matrix, parts["columns"], *parts["scales"].unbind(-3), codec.layout.group, 3)
    decoded = codec.decode(parts)
    decoded = decoded.mT if kind == "key" else decoded
    assert ((decoded - expected).abs() < 1e-4).float().mean() > 0.999  # but where a code lies in the middle of two


def test_a_scale_of_tokens_saves_a_group_from_one_long_token():
    codec = codec_of("token-norm", group_size=48)
    pages = pages_of(codec, 4)
    pages[:, 7] *= 50
    others = torch.arange(48) != 7
    decoded = codec.decode(codec.encode(pages))
    scale, low = (pages.amax(1, keepdim=True) - pages.amin(1, keepdim=True)) / 3, pages.amin(1, keepdim=True)
    affine = ((pages - low) / scale).round() * scale + low
    assert ((decoded - pages)[:, others] ** 2).mean() < 0.2 * ((affine - pages)[:, others] ** 2).mean()


def filled(codecs, k=4, v=4, transforms=None, tokens=120, dtype=torch.bfloat16):
    model = build("llama", dtype, wide=True)
    model.set_attn_implementation("kvmix")
    cache = CacheSettings(page=16, sink=4, window=Recent(tokens=10), codecs=codecs, transforms=transforms)
    plan = Plan.uniform(model_info(model.config, "test"), k, v, cache)
    mixed = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(torch.arange(2 * tokens).view(2, -1) % 90, past_key_values=mixed)
        logits = model(torch.ones(2, 1, dtype=torch.long), past_key_values=mixed).logits
    return plan, mixed, logits


@pytest.mark.parametrize("name", CODECS)
def test_predicted_bytes_are_measured_bytes(name):
    plan, cache, logits = filled(PageCodecs(k=name, v=None if name == "token-norm" else name))
    assert plan.cache_bytes(120, batch=2).total + 2 * plan.unquantized_bytes(1) == cache.nbytes
    assert logits.isfinite().all()


def test_eight_bits_of_rotated_keys_and_values_are_nearly_the_model():
    rotated = Transforms(k=(Rotate(),), v=(Rotate(),))
    _, _, exact = filled(None, 16, 16, dtype=torch.float32)
    for name in ("symmetric", "two-axes"):
        _, _, ours = filled(PageCodecs(k=name, v=name), 8, 8, rotated, dtype=torch.float32)
        assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.skipif(library() is None, reason="there is no native library")
def test_vectors_are_attended_to_by_tables_and_without_the_library_as_before(monkeypatch):
    """The same logits either way, of a plan as those of VecInfer and HIGGS, and no decoding where there are tables."""
    plan = PageCodecs(k="vectors", v="vectors"), 2, 2, Transforms(k=(Rotate(),), v=(Rotate(),))
    with monkeypatch.context() as patched:
        patched.setattr("kvmix_kernels.attend.library", lambda: None)
        _, _, expected = filled(*plan, dtype=torch.float32)
    monkeypatch.setattr("kvmix_kernels.attend.naive.attend", None)
    _, _, logits = filled(*plan, dtype=torch.float32)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_tokens_can_be_taken_back():
    _, cache, _ = filled(PageCodecs(k="symmetric", v="vectors"))
    before = cache.layers[0].stores[0].segments().read(0, 40, torch.float32)
    cache.crop(-81)
    assert cache.get_seq_length() == 40
    after = cache.layers[0].stores[0].segments().read(0, 40, torch.float32)
    assert torch.allclose(before, after, atol=1e-2)


def test_what_does_not_combine_is_refused_by_name():
    info = model_info(build("llama", torch.float32, wide=True).config, "test")
    for axes in ({"tokens": {"evict": 0.5, "flush": 320}}, {"reading": {"share": 0.5}}):
        with pytest.raises(ValueError, match=f"page codecs combine with transforms only, not with {next(iter(axes))}"):
            CacheSettings.model_validate({"page": 32, "codecs": {"k": "symmetric"}, **axes})
    with pytest.raises(PlanError, match=r"unknown codec 'symetric' \(did you mean 'symmetric'\?\)"):
        Plan.uniform(info, 2, 2, CacheSettings(codecs=PageCodecs(k="symetric")))
    with pytest.raises(PlanError, match="the codec token-norm is for keys"):
        Plan.uniform(info, 2, 2, CacheSettings(codecs=PageCodecs(v="token-norm")))
    with pytest.raises(ValueError, match="codecs need a name for k, for v, or for both"):
        PageCodecs()


def test_what_is_not_finite_or_too_large_is_refused():
    codec = codec_of("symmetric")
    packing = CodecPacking("layer 3 keys", codec)
    states = torch.ones(1, 1, 48, 32)
    for bad, said in ((torch.nan, "NaN or Inf"), (1e8, "do not fit float16 scales")):
        with pytest.raises(QuantizationError, match=f"layer 3 keys: .*{said}"):
            packing.pack(states * bad)
    assert packing.tokens == 0


class Wrong(PageCodec):
    """A codec whose parts are others than it says."""

    @property
    def parts(self):
        return {"codes": StoredPart((self.page,))}

    def encode(self, pages):
        return {"codes": pages}

    def decode(self, parts):
        raise AssertionError("nothing is ever stored")


def test_a_codec_of_ones_own_that_breaks_its_word_is_one_line():
    packing = CodecPacking("layer 0 values", Wrong("value", 2, 32, 48))
    with pytest.raises(PlanError, match=r"layer 0 values: codec Wrong returned .*float32.*; its parts are .*uint8"):
        packing.pack(torch.ones(1, 1, 48, 32))
