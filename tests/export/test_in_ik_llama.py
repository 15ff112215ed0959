"""The types that an export names in ik_llama.cpp, in all layers or in the first and last ones, where it is installed.

    pip install --no-deps ik-llama-cpp-python gguf

The package has the library without ik_llama.cpp's own command line, so arguments are read here, by the names that
`common/common.cpp` has.
"""

import ctypes
import shlex

import pytest
import torch
from evaluating import tiny
from gguf_files import TINY, write
from tokenizers import Tokenizer

from kvmix_cli.cache.baselines.casting import EngineCache
from kvmix_cli.export import TARGETS
from kvmix_cli.plan import Plan
from kvmix_cli.plan.engines.formats import GGML

pytest.importorskip("gguf")
ik = pytest.importorskip("ik_llama_cpp._ctypes_api", reason="ik-llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
"""`enum ggml_type`."""
TOKENS, READ = 640, 256
QUERIES = 1e-4
"""Nats a token, by which its kernel may lose more: it quantizes queries, too, to 8 bits."""
PLANS = {  # its flash attention on CPUs has no q5_0 and q5_1, and ends the process
    "q8_0": ("0-7:k8v8", None),
    "q4_0": ("0-7:k4v4", None),
    "ends": ("0:k16v8,1-5:k4v4,6-7:k8v16", None),
    "keys alone": ("0-1:k8v16,2-7:k4v16", None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The built-in model in ik_llama.cpp."""
    ik.llama_backend_init()
    path = write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    loaded = ik.llama_model_load_from_file(str(path).encode(), ik.llama_model_default_params())
    yield loaded
    ik.llama_free_model(loaded)


@pytest.fixture(scope="module")
def text():
    """Tokens of the built-in model's held-out text."""
    from kvmix_cli.texts.builtin import builtin_texts

    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(builtin_texts(held_out=True)[0]).ids
    return ids[:TOKENS]


def settings(text):
    """What ik_llama.cpp's command line makes of arguments."""
    params = ik.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = TOKENS
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn = True
    words = shlex.split(text)
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name in ("k_cache_hadamard", "v_cache_hadamard"):
            setattr(params, name, True)
        elif name.endswith(("_first", "_last")):
            kind, count = words.pop(0).split(",")
            place = name.removeprefix("cache_type_")
            setattr(params, f"type_{place}", TYPES[kind])
            setattr(params, f"n_{place}", int(count))
        elif name == "flash_attn":
            assert words.pop(0) == "on"
        else:
            setattr(params, name.removeprefix("cache_"), TYPES[words.pop(0)])
    return params


def predicted(model, text, arguments):
    """Log-probabilities `[TOKENS - READ, vocabulary]` after a text's later tokens, and the bytes of the cache."""
    context = ik.llama_init_from_model(model, settings(arguments))
    assert context
    try:
        batch = ik.llama_batch_init(TOKENS, 0, 1)
        batch.n_tokens = TOKENS
        for place, token in enumerate(text):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, place >= READ
        assert ik.llama_decode(context, batch) == 0
        count = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(model))
        rows = [ik.llama_get_logits_ith(context, place)[:count] for place in range(READ, TOKENS)]
        ik.llama_batch_free(batch)
        size = ik._lib.llama_state_seq_get_size
        size.argtypes, size.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_size_t
        return torch.tensor(rows).log_softmax(-1), size(context, 0)
    finally:
        ik.llama_free(context)


@torch.inference_mode()
def simulated(text, cache):
    """The same from our cache: later tokens read all others as they are stored."""
    loaded = tiny().model
    loaded(input_ids=torch.tensor([text[:READ]]), past_key_values=cache)
    return loaded(input_ids=torch.tensor([text[READ:]]), past_key_values=cache).logits[0].float().log_softmax(-1)


def divergence(reference, other):
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def full(model, text):
    """Both engines without a plan."""
    own = simulated(text, EngineCache(dict.fromkeys(range(8), (GGML["f16"], GGML["f16"])), tiny().config))
    theirs, _ = predicted(model, text, "--flash-attn on")
    assert divergence(own, theirs) < 1e-4
    return own, theirs


@pytest.mark.parametrize("name", PLANS)
def test_its_cache_takes_the_types_and_loses_what_the_simulation_does(name, model, text, full, record_property):
    export = TARGETS["ik_llama"].export(Plan.from_short(PLANS[name][0], tiny().info), PLANS[name][1])
    found, size = predicted(model, text, export.text)
    here = divergence(full[0], simulated(text, EngineCache(export.formats, tiny().config)))
    there = divergence(full[1], found)
    record_property("divergence", f"{there:.3g}, simulated {here:.3g}")
    heads = tiny().info.heads(0)
    stored = sum(each.nbytes(heads.key_dim) for pair in export.formats.values() for each in pair) * heads.kv_heads
    assert size == pytest.approx(stored * TOKENS, abs=16 * TOKENS), "beside positions"
    assert there == pytest.approx(here, rel=0.35, abs=QUERIES)
