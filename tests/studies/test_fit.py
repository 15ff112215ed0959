"""Answers about memory: the largest context and batch, formats of other engines, estimates of activations, torch."""

import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from gguf_files import TINY, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import sdpa_mask

from kvmix_cli.errors import BudgetError, ModelError
from kvmix_cli.models.activations import ActivationSizes, activation_sizes
from kvmix_cli.models.configuration import Checkpoint, find_config
from kvmix_cli.models.stock import StockLayer, stock_cache
from kvmix_cli.models.weight_bytes import WeightBytes, find_weights
from kvmix_cli.plan import CacheSettings, HeadGeometry, ModelInfo, Plan
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc
from kvmix_cli.studies.fit.answer import FitQuestion, answer, average_plan
from kvmix_cli.studies.fit.facts import ModelFacts, read_facts
from kvmix_cli.studies.fit.formats import LlamaCppFormat, PlanFormat, VllmFormat

MIB, GIB = 2**20, 2**30


def facts_of(layers, *, heads=8, dim=128, weights=0, max_length=None, window=None, sliding=0):
    """A made-up model whose first `sliding` layers have a window."""
    geometry = HeadGeometry(kv_heads=heads, key_dim=dim, value_dim=dim)
    stock = dict.fromkeys(range(sliding), "sliding_attention")
    info = ModelInfo(id="org/model", layers=layers, kv_heads=heads, head_dim=dim, stock=stock)
    cache = [StockLayer("sliding", geometry, window=window)] * sliding
    cache += [StockLayer("full", geometry, is_planned=True)] * (layers - sliding)
    sizes = ActivationSizes(256, 256, 64, 768, 1000, sliding=0, window=window)
    return ModelFacts(
        info, tuple(cache), WeightBytes({"BF16": (weights // 2, weights)}, "a test"), sizes, max_length, "bfloat16"
    )


WINDOWS = st.one_of(st.integers(0, 70).map(lambda tokens: Recent(tokens=tokens)), st.just(NoWindow()), st.just(Rpc()))


PLANS = st.builds(
    lambda window, page, sink, k: (CacheSettings(page=page, sink=sink, group_size=16, window=window), k),
    WINDOWS,
    st.sampled_from([16, 32, 48]),
    st.integers(0, 9),
    st.sampled_from([1, 2, 4, 8]),
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(plan=PLANS, share=st.floats(0.02, 1.3))
def test_whatever_is_shorter_than_the_longest_context_fits_and_one_token_more_does_not(plan, share):
    facts, (cache, k) = facts_of(2, heads=2, dim=16, max_length=200), plan
    plan = Plan.from_short(f"0:k{k}v2,1:k2v4", facts.info, cache)
    form = PlanFormat("p", facts, 2, None, plan=plan)
    totals = [form.cache_bytes(context, 1) + facts.activations.peak(context, 1, 2) for context in range(1, 201)]
    memory = int(share * totals[-1])
    row = answer(facts, {"p": plan}, FitQuestion(context=100, memory=memory)).rows[1]
    assert row.max_context == next((index for index, total in enumerate(totals) if total > memory), 200)


def test_batch_and_memory():
    facts = facts_of(4, heads=2, dim=64, weights=10 * MIB, max_length=4096)
    found = answer(facts, {"p": Plan.uniform(facts.info, 4, 4)}, FitQuestion(context=2048, batch=3, memory=40 * MIB))
    for row in found.rows:
        form, most = row.format, row.max_batch

        def total(batch, form=form):
            tokens = 2048 if form.at_once is None else min(2048, form.at_once)
            return 10 * MIB + facts.activations.peak(tokens, batch, 2, 2048) + form.cache_bytes(2048, batch)

        assert total(most) <= 40 * MIB < total(most + 1)
        assert row.total_bytes == total(3)
        assert row.fits(found.question.memory) is (total(3) <= 40 * MIB)


def test_needed_bits_are_those_that_fill_the_memory():
    """A cache of exactly so many bits for each element, everything counted, takes exactly what is there."""
    facts = facts_of(6, heads=2, dim=64, weights=MIB, window=127, sliding=2)
    found = answer(facts, {}, FitQuestion(context=4096, batch=2, memory=90 * MIB))
    stock = 2 * 2 * 127 * 2 * 128 * 2
    activations = facts.activations.peak(4096, 2, 2)
    elements = 4 * 2 * 4096 * 2 * 128
    assert found.left == 90 * MIB - MIB - activations - stock
    assert found.needed_bits == pytest.approx(8 * found.left / elements)


def test_a_memory_below_the_weights_is_refused():
    with pytest.raises(BudgetError, match=r"org/model needs 13\.5 GiB for weights alone, and 8 GiB are there"):
        answer(facts_of(4, weights=int(13.5 * GIB)), {}, FitQuestion(context=10, memory=8 * GIB))


@pytest.mark.parametrize("bits", [1, 2.3, 3.9, 5, 8, 16])
def test_an_average_is_kept_from_below(bits):
    info = facts_of(10).info
    nominal = average_plan(info, bits).bits.nominal
    steps = {width for layer in average_plan(info, bits).layers.values() for width in (layer.k.bits, layer.v.bits)}
    assert nominal <= bits + 1e-6
    assert bits - nominal < (max(steps) - min(steps)) / 10 + 1e-6
    with pytest.raises(BudgetError, match=r"0\.5"):
        average_plan(info, 0.5)


LLAMA_3_8B = facts_of(32, max_length=131072)


@pytest.mark.parametrize(
    ("kind", "mib"), [("f16", 1024), ("q8_0", 544), ("q5_1", 384), ("q5_0", 352), ("q4_1", 320), ("q4_0", 288)]
)
def test_cells_of_llama_cpp(kind, mib):
    """It logs `size = 1024.00 MiB (8192 cells, 32 layers)` in f16 and 544.00 MiB in q8_0 for Llama-3-8B at -c 8192."""
    form = LlamaCppFormat("x", LLAMA_3_8B, 2, None, kind)
    assert form.cache_bytes(8192, 1) == mib * MIB
    assert form.cache_bytes(8000, 1) == form.cache_bytes(8192, 1) < form.cache_bytes(8193, 1)
    assert form.bits[1] == pytest.approx(16 * mib / 1024)


def test_windows_of_llama_cpp_have_room_for_a_batch():
    facts = facts_of(4, window=1023, sliding=2)
    cells = (32768 + 1536) * 2  # 1024 and 512, already a multiple of 256
    assert LlamaCppFormat("x", facts, 2, None, "f16").cache_bytes(32768, 1) == cells * 2 * 8 * 128 * 2


def test_heads_of_no_whole_blocks_are_a_row_with_the_reason():
    found = answer(facts_of(2, dim=80), {}, FitQuestion(context=100, memory=GIB))
    faults = {row.format.name: row.fault for row in found.rows}
    assert faults["llama.cpp-f16"] is None
    assert faults["llama.cpp-q8_0"] == "heads of 80 channels are not whole blocks of 32"


def test_blocks_of_vllm():
    page = 16 * 8 * 2 * 128
    full = VllmFormat("x", LLAMA_3_8B, 2, None, number_bytes=1)
    assert full.cache_bytes(1000, 3) == 3 * 32 * 63 * page
    sliding = VllmFormat("x", facts_of(4, window=127, sliding=4 - 1), 2, None, number_bytes=2)
    assert sliding.cache_bytes(1000, 1) == (63 + 3 * 9) * page * 2
    assert sliding.cache_bytes(40, 1) == 4 * 3 * page * 2


class Live(TorchDispatchMode):
    """The most bytes of tensors alive at once that were made within, beside a model's own."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = {each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, made)
        return made

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self.forget, key, size)
            self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def fused(module, query, key, value, attention_mask, **kwargs):
    """Attention that makes its output and nothing else, as fused kernels do."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


transformers.AttentionInterface.register("fused", fused)
transformers.AttentionMaskInterface.register("fused", sdpa_mask)
LARGE = {
    "LlamaConfig": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen3Config": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "Gemma3TextConfig": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_key_value_heads": 4,
        "sliding_window": 1024,
    },
    "Phi3Config": {"pad_token_id": 0},
    "MixtralConfig": {},
    "GptOssConfig": {},
}


@pytest.mark.parametrize("name", LARGE)
def test_activations_are_about_what_pytorch_has_alive(name):
    """On no device, so that models of many gigabytes take none; measured are 0.8 to 1.25 times the estimate."""
    config = getattr(transformers, name)(**LARGE[name], num_hidden_layers=2, max_position_embeddings=8192)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="fused")
    cache, tokens = transformers.DynamicCache(config=config), 4096
    with torch.inference_mode(), Live(model) as live:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = stock_cache(config, name)
    kept = sum(layer.nbytes(tokens, 1, 2) for layer in layers)
    estimate = activation_sizes(config, layers).peak(tokens, 1, 2)
    assert 0.75 < (live.peak - kept) / estimate < 1.35


def checkpoint_of(folder, config=None):
    """A folder with builtin:tiny's configuration, changed, and nothing else."""
    text = json.loads((TINY / "config.json").read_text()) | (config or {})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(text))
    return find_config(str(folder), None, False)


@pytest.mark.slow
def test_weights_of_headers_index_files_and_architecture(tmp_path, monkeypatch):
    whole = find_weights(*find_config("builtin:tiny", None, False))
    assert (whole.total, whole.parameters) == (13_902_336, 6_951_168)
    assert [whole.at(dtype) for dtype in ("float32", "int4")] == [4 * 6_951_168, 6_951_168 // 2]

    counted = find_weights(*checkpoint_of(tmp_path / "nothing"))
    assert (counted.by_dtype, counted.source) == (whole.by_dtype, "the architecture, counted with torch")

    found = checkpoint_of(tmp_path / "index")
    index = {"metadata": {"total_size": 13_902_336}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_weights(*found).by_dtype == whole.by_dtype

    found = checkpoint_of(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(bytes(1000))
    assert find_weights(*found).total == 1000

    file = write(tmp_path / "tiny.gguf", "Q8_0")
    packed = find_weights(*find_config(str(file), None, False))
    assert packed.parameters == 6_951_168
    assert 0 < file.stat().st_size - packed.total < 300_000  # vocabulary and merges
    assert packed.at("bfloat16") == whole.total


def test_weights_of_the_hub(monkeypatch):
    """One question to the hub; quantized weights keep the integers that they are in."""
    _, config = find_config("builtin:tiny", None, False)
    checkpoint = Checkpoint("org/model", "org/model", None, False)

    counts = SimpleNamespace(parameters={"BF16": 1000, "I32": 500})
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: SimpleNamespace(safetensors=counts))
    found = find_weights(checkpoint, config)
    assert (found.total, found.source, found.at("int8")) == (4000, "the hub", 3000)

    def unreachable(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    assert find_weights(checkpoint, config).parameters == 6_951_168


def test_a_model_that_cannot_be_built_is_refused(tmp_path):
    found = checkpoint_of(tmp_path / "odd", {"hidden_act": "nothing"})
    with pytest.raises(ModelError, match="cannot be built from its configuration"):
        find_weights(*found)


SCRIPT = """
import importlib, sys
from kvmix_cli.studies.fit.facts import read_facts
for name in sys.argv[1:]:
    facts = read_facts(name)
    assert facts.needed_torch is None, facts.needed_torch
    print(facts.info.config_sha256, facts.weights.total)
left = [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")]
assert not left, left
assert importlib.util.find_spec("torch") is not None
"""


@pytest.mark.slow
def test_torch_is_not_loaded_and_nothing_that_has_missed_it_is_left(tmp_path):
    """Of a model folder and of a GGUF file; in a process of its own, since tests have torch loaded."""
    names = ["builtin:tiny", str(write(tmp_path / "tiny.gguf"))]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = [read_facts(name) for name in names]
    assert done.stdout.splitlines() == [f"{each.info.config_sha256} {each.weights.total}" for each in facts]
    assert done.stderr == ""
