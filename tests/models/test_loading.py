"""Loading: what comes back, and one clear line for everything that cannot be loaded."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from profiling_models import load, token_ids
from safetensors.torch import load_file, save_file
from transformers import modeling_utils
from warned import warns_once

import kvmix_cli
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.batch import StopRule, generate_batch, score_batch
from kvmix_cli.decoding.feed import document_loss
from kvmix_cli.decoding.generate import generate
from kvmix_cli.errors import ModelError, ProjectionError, TextError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.models import devices, loading, multimodal
from kvmix_cli.models.loading import load_info, load_model
from kvmix_cli.models.projections import find_projections
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.windows import NoWindow
from kvmix_cli.profiling.run import run_profile
from kvmix_cli.quiet import hushed
from kvmix_cli.ranks import Ranks
from kvmix_cli.texts.tokens import encode

TINY = Path(kvmix_cli.__file__).parent / "assets" / "tiny"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the built-in model."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def failure(model_id, **options):
    with pytest.raises(ModelError) as error:
        load_model(str(model_id), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# What comes back


def test_the_builtin_model():
    loaded = load_model("builtin:tiny")
    info = loaded.info
    assert (info.id, info.layers, info.kv_heads, info.head_dim, info.stock) == ("builtin:tiny", 8, 2, 64, {})
    assert loaded.max_length == 4096
    assert loaded.device == torch.device("cpu")
    assert loaded.model.dtype == torch.float32, "bfloat16 arithmetic is slow on CPUs"
    assert loaded.model.config._attn_implementation == "kvmix"
    assert not loaded.model.training
    assert load_info("builtin:tiny") == info


def test_the_builtin_model_is_trained():
    loaded = load_model("builtin:tiny")
    ids = loaded.tokenizer('def main() -> None:\n    """Run the', return_tensors="pt").input_ids
    with torch.no_grad():
        loss = loaded.model(input_ids=ids, labels=ids).loss
    assert loss < 5, "an untrained model has a loss of log(4096) = 8.3"


def test_a_folder(folder):
    loaded = load_model(str(folder))
    assert loaded.model.dtype == torch.bfloat16, "the checkpoint's"
    assert loaded.info.id == str(folder)
    assert loaded.info.config_sha256 == load_info("builtin:tiny").config_sha256


@pytest.mark.parametrize(("name", "dtype"), devices.DTYPES.items())
def test_dtypes(name, dtype):
    assert load_model("builtin:tiny", dtype=name).model.dtype == dtype


def test_a_device_map_needs_accelerate(monkeypatch):
    pytest.importorskip("accelerate")
    assert load_model("builtin:tiny", device="map").device == torch.device("cpu")
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert failure("builtin:tiny", device="map").endswith("pip install 'kvmix[multi-gpu]'")


def test_every_rank_of_a_machine_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = [Ranks(rank, 6, local=rank % 3) for rank in range(6)]
    assert [devices.find_device("auto", each) for each in ranks] == [f"cuda:{number}" for number in (0, 1, 0) * 2]
    assert devices.find_device("cuda", ranks[1]) == "cuda:1"
    assert devices.find_device("cpu", ranks[1]) == "cpu"
    with pytest.raises(ModelError, match="--device map gives all GPUs to one process"):
        devices.find_device("map", ranks[0])


def test_a_spread_model_decodes_through_the_cache_as_a_whole_one_does(tmp_path):
    """One layer is on the disk: it comes to where its input is, and its cache is allocated there."""
    pytest.importorskip("accelerate")
    plain = load("llama", head_dim=32)
    plain.model.save_pretrained(tmp_path)
    places = {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(plain.info.layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    options = {"device_map": {**places, **rest}, "offload_folder": tmp_path / "offload"}
    spread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert next(spread.model.layers[1].parameters()).is_meta
    plan = Plan.uniform(plain.info, 4, 4, CacheSettings(page=16, sink=0, group_size=16, window=NoWindow()))
    ids, losses = token_ids(60)[0].tolist(), []
    for model in (plain.model, spread):
        loaded, cache = replace(plain, model=model), MixedCache.from_plan(plan, model.config)
        losses.append(document_loss(loaded, cache, ids, 20, 8))
        assert cache.attended.quantized > 0
        assert {layer.device for layer in cache.layers} == {torch.device("cpu")}
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    with pytest.raises(ProjectionError, match="layer 1 of small is offloaded"):
        find_projections(spread, plain.info)


def test_a_class_without_the_attention_interface_keeps_its_own(tmp_path):
    save_small("falcon", tmp_path)
    with warns_once(UserWarning, match="FalconForCausalLM does not take .* 'kvmix' and keeps"):
        loaded = load_model(str(tmp_path))
    assert loaded.model.config._attn_implementation != "kvmix"


def test_loading_is_silent(folder, capfd):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(folder))
    assert capfd.readouterr() == ("", "")


def test_silence_ends_with_loading():
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    load_model("builtin:tiny")
    with pytest.raises(ZeroDivisionError), hushed():
        _ = 1 / 0
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    assert transformers.utils.logging.get_verbosity() == level


# What cannot be loaded


@pytest.mark.parametrize("model_id", ["nobody/nothing", "nothing", "no such name!"])
def test_an_unknown_id(model_id):
    message = failure(model_id)
    assert message.startswith(f"cannot load {model_id}: ")
    assert all(hint in message for hint in ("check the name", "HF_TOKEN", "local folder", "builtin:tiny"))


def test_a_builtin_that_is_not_there():
    assert failure("builtin:tini") == "no built-in model 'tini' (did you mean 'tiny'?): there is builtin:tiny"


@pytest.mark.parametrize("model_id", ["./nothing", "/no/such/place", "~/nothing", "models/llama/7b"])
def test_a_folder_that_is_not_there(model_id):
    assert failure(model_id).startswith(f"no folder {model_id}")


def test_a_file(folder):
    assert "is a file: give the folder" in failure(folder / "model.safetensors")


def test_a_folder_without_a_config(tmp_path):
    assert failure(tmp_path).startswith(f"{tmp_path} has no config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ("[]", "Unrecognized model"),
        ('{"hidden_size": 3}', "Unrecognized model"),
        ('{"model_type": "zork"}', "does not recognize this architecture"),
        ('{"model_type": "llama", "num_hidden_layers": "x"}', "num_hidden_layers"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config.json must be"),
        (
            '{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}',
            "refuses its config.json (The hidden size (65) is not a multiple of the number of attention heads (4))",
        ),
        ('{"model_type": "llama", "hidden_act": 3}', "expected str, got int (value: 3)): correct that file"),
        ('{"model_type": "t5"}', "no causal language model, but of type t5"),
        ('{"model_type": "zork", "auto_map": {"AutoConfig": "a.B"}}', "pass --trust-remote-code"),
        ('{"model_type": "mamba"}', "nothing to quantize"),
        ('{"model_type": "llama", "num_hidden_layers": -1}', "-1 layers"),
        (
            '{"model_type": "gemma3_text", "num_hidden_layers": 1e12}',
            "1e+12 as its num_hidden_layers; expected at most",
        ),
        ('{"model_type": "gemma3", "text_config": {"num_hidden_layers": 1000000000000}}', "expected at most 10000"),
        ('{"model_type": "llama", "architectures": 7}', "has 7 as its architectures; expected a list with the name of"),
        ('{"model_type": "llama", "architectures": [3]}', "has [3] as its architectures"),
        ('{"model_type": "whisper"}', "is an encoder-decoder (whisper)"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "is an encoder (BertForMaskedLM)"),
    ],
)
def test_configurations_that_cannot_be_used(folder, config, message):
    (folder / "config.json").write_text(config)
    assert message in failure(folder)
    with pytest.raises(ModelError):
        load_info(str(folder))


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in failure(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "cannot load the weights" in failure(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", (TINY / "model.safetensors").read_bytes()[:100_000]])
def test_damaged_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    found = f"has {len(content)} of " if len(content) > 100 else "has no tensors that can be read"
    assert f"model.safetensors {found}" in failure(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"eos_token_id": ', "[" * 100_000])
def test_generation_settings_that_cannot_be_read_are_not_passed_over(folder, text):
    """Transformers would go on without them, and so without the tokens that end an answer."""
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json of" in failure(folder)
    assert "is no JSON object: correct it, or take it away" in failure(folder)


def shard(folder, place="model-00002-of-00002.safetensors"):
    """Split the weights into two shards, of which the second is at a place of its own."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], place: names[1::2]}
    for path, half in halves.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weights[name] for name in half}, folder / path, metadata={"format": "pt"})
    found = {name: path for path, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return folder / place


def test_shards_are_loaded_unless_one_is_missing_or_cut_short(folder):
    second = shard(folder)
    assert load_model(str(folder)).info.layers == 8
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert f"{second.name} has {len(whole) - 1} of {len(whole)} bytes; get the file again" in failure(folder)
    second.unlink()
    assert f"1 of 2 files that model.safetensors.index.json names are missing: {second.name}" in failure(folder)


@pytest.mark.parametrize("place", ["../outside.safetensors", "{}/outside.safetensors", "a/../../outside.safetensors"])
def test_a_shard_outside_the_folder_is_refused_and_not_read(folder, tmp_path, monkeypatch, place):
    """The file is there, and would load."""
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    shard(folder, place.format(outside))
    monkeypatch.setattr(loading, "_load_weights", lambda *_, **__: pytest.fail("it was loaded"))
    message = failure(folder)
    assert f"names {place.format(outside)}, which is not inside the folder: do not trust it" in message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "[" * 100_000])
def test_a_damaged_index_of_shards_is_one_line(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json of" in failure(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_files_that_git_lfs_has_not_fetched_are_said(folder, name):
    """A clone without git-lfs has small text files in their place."""
    if "-of-" in name:
        shard(folder)
    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12\n"
    )
    (folder / name).write_text(pointer)
    assert f"has {name} only as git-LFS pointers, not the contents: run `git lfs pull`" in failure(folder)


def test_pickled_weights_are_taken_only_if_allowed(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "a version with *.safetensors, or add --allow-pickle if you trust its author" in failure(folder)
    assert load_model(str(folder), allow_pickle=True).info.layers == 8


class Marker:
    """An object whose pickle writes a file when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


@pytest.mark.parametrize("options", [{}, {"allow_pickle": True}])
def test_no_code_of_a_model_folder_is_run(folder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nraise SystemExit\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **own}))
    change_config(folder, auto_map=names)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Marker()}, folder / "pytorch_model.bin")
    failure(folder, **options)
    change_config(folder, model_type="zork")
    assert "pass --trust-remote-code" in failure(folder, **options)
    assert not (tmp_path / "was-run").exists()


def test_no_conversion_is_asked_of_the_hub(folder, monkeypatch):
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    seen = []
    real = multimodal.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **options):
        seen.append((os.environ.get("DISABLE_SAFETENSORS_CONVERSION"), options["use_safetensors"]))
        return real(*args, **options)

    monkeypatch.setattr(multimodal.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(str(folder))
    assert seen == [("1", True)]
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


def test_missing_weights_are_not_made_up(folder):
    """transformers would fill them with random numbers and only warn."""
    change_weights(folder, lambda name, weight: None)
    message = failure(folder)
    assert "lacks 1 of the weights" in message
    assert "layers.3.self_attn.k_proj.weight" in message


@pytest.mark.slow
def test_weights_of_another_shape(folder):
    change_weights(folder, lambda name, weight: weight[:64].clone())
    assert "has in another shape 1 of the weights" in failure(folder)


@pytest.mark.parametrize("place", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "org/kernel", "kernels-community/flash-attn", "no such"])
def test_an_attention_in_the_configuration_is_not_asked_for(folder, monkeypatch, place, attention):
    """It neither refuses the model nor fetches a kernel from the hub."""
    monkeypatch.setattr(
        modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("a kernel was fetched")
    )
    change_config(folder, **{place: attention})
    assert load_model(str(folder)).config._attn_implementation == "kvmix"


@pytest.mark.parametrize("installed", [(), ("sentencepiece",), ("sentencepiece", "google.protobuf", "tiktoken")])
def test_advice_names_the_packages_that_are_missing(folder, monkeypatch, installed):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setattr(loading, "_is_installed", lambda module: module in installed)
    message = failure(folder)
    for package, module in {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}.items():
        assert (package in message.partition("pip install")[2]) == (module not in installed)


def test_a_tokenizer_with_more_tokens_than_the_embedding(folder):
    change_config(folder, vocab_size=4000)
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight[:4000].clone() if len(weight) == 4096 else weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "gives token ids up to 4095, its embedding ends at 3999: use the tokenizer" in failure(folder)


def test_a_padding_token_beyond_the_embedding_is_no_fault(folder):
    """Many fine-tuned models have one; ordinary text does not contain it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new padding>"})
    tokenizer.save_pretrained(folder)
    assert len(load_model(str(folder)).tokenizer) == 4097


def test_a_token_beyond_the_embedding_is_refused_wherever_text_is_read(folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new padding>"})
    tokenizer.save_pretrained(folder)
    loaded, text = load_model(str(folder), dtype="float32"), "one two <new padding> three " * 200
    ids = tuple(encode(loaded.tokenizer, text))
    (tmp_path / "text.txt").write_text(text)
    settings = Settings(length=160, prefix=64, limit=1, text=str(tmp_path / "text.txt"))
    plain = unquantized_cache(loaded.config)
    for act in (
        lambda: generate(loaded, ids, plain),
        lambda: document_loss(loaded, plain, ids, 64, 8),
        lambda: generate_batch(loaded, Subject(), [ids], 64, StopRule(4)),
        lambda: score_batch(loaded, Subject(), [ids], [8], 64, 8),
        lambda: run_profile(loaded, ["error"], texts=[text], source="text", samples=1, seq_len=300),
        *(partial(run_task, get_task(name), loaded, [], settings) for name in ("perplexity", "memory", "throughput")),
    ):
        with pytest.raises(
            TextError, match=r"token 4096 \('<new padding>'\), and the embedding .* ends at 4095: leave"
        ):
            act()


@pytest.mark.parametrize(
    "changes",
    [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": False}],
)
def test_what_a_forward_returns_is_not_the_checkpoints_choice(folder, changes):
    change_config(folder, **changes)
    output = load_model(str(folder)).model(torch.tensor([[1, 2, 3]]), use_cache=True)
    assert sorted(output) == ["logits", "past_key_values"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pad_token_id": 99999}, "Padding_idx must be within"),
        ({"hidden_act": "zork"}, "has hidden_act 'zork', which this transformers does not know: correct it"),
        ({"dtype": "zork"}, "has no attribute 'zork'"),
        ({"rope_scaling": {"type": "zork"}}, "type 'zork', which this transformers does not know"),
        ({"rope_parameters": {"rope_type": "zork", "rope_theta": 1e4}}, "has rope_parameters.rope_type 'zork'"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(folder, changes, said):
    change_config(folder, **changes)
    assert said in failure(folder)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_short_names_of_dtypes(name, dtype):
    assert load_model("builtin:tiny", dtype=name).dtype == dtype


def test_a_path_a_dtype_and_a_device_may_be_those_of_python_and_torch(folder):
    loaded = load_model(Path(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert loaded.dtype == "bfloat16"
    assert loaded.info == load_model(str(folder)).info == load_info(Path(folder))
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        load_model(Path(folder), dtype=torch.int8)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "", "has a tokenizer that cannot be used ("),
        ("tokenizer.json", '{"version": "1.0"', "again"),
        ("tokenizer_config.json", "{", "get tokenizer.json and tokenizer_config.json again"),
        (
            "tokenizer_config.json",
            '{"model_max_length": "x"}',
            "has a tokenizer that cannot be used ('>' not supported",
        ),
    ],
)
def test_a_damaged_tokenizer_is_said_to_be_damaged(folder, name, content, said):
    (folder / name).write_text(content)
    message = failure(folder)
    assert said in message
    assert "pip install" not in message


def test_a_tokenizer_without_a_vocabulary_is_none(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert failure(folder).endswith("has a tokenizer without a vocabulary: it needs tokenizer.json")


def test_a_text_config_that_the_type_does_not_have(folder):
    change_config(folder, text_config={"model_type": "llama"})
    assert "a configuration inside its config.json that models of type llama do not have" in failure(folder)


def test_an_unknown_dtype():
    assert failure("builtin:tiny", dtype="float23") == (
        "unknown dtype 'float23' (did you mean 'float32'?): use auto, float32, bfloat16, float16"
    )


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_an_unknown_device(device):
    assert failure("builtin:tiny", device=device).startswith(f"no device '{device}' here")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n lots"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_a_device_that_is_too_small(monkeypatch, error):
    def full(self, device):
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "to", full)
    assert "does not fit on cpu" in failure("builtin:tiny", device="cpu")


def save_small(family, folder):
    load(family, vocab_size=4096).model.save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    """Rewrite the model file with one weight changed, or left out."""
    name = "model.layers.3.self_attn.k_proj.weight"
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(name, weights[name])
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_in_several_files(folder):
    """A sharded checkpoint is one model; without one of its files it is one line."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2MB")
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    one, other = load_model(str(folder)).model, load_model("builtin:tiny", dtype="bfloat16").model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    shards[0].unlink()
    assert "\n" not in failure(folder)


def test_gpt_oss_with_experts_in_mxfp4(tmp_path):
    """Without a GPU transformers unpacks them, and gradients are those of dense weights."""
    sizes = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 2}
    experts = {"intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "eos_token_id": 2}
    config = transformers.GptOssConfig(**sizes, **kinds, **experts, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    packed = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, inner, outer = weight.shape
            packed[f"{name}_blocks"] = torch.randint(0, 256, (count, outer, inner // 32, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.full((count, outer, inner // 32), 120, dtype=torch.uint8)
        else:
            packed[name] = weight
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    texts = ["one two three " * 90]
    found = run_profile(loaded, ["grad-norm"], texts=texts, source="text", samples=1, seq_len=64).scores["grad-norm"]
    assert list(found.layers) == [1]
    assert found.layers[1].k.mean > 0
