"""Classes that are listed as causal language models, small: those that cannot be used are refused in one line."""

import re
import shutil
import warnings

import pytest
import torch
import transformers
from commandline import kvmix
from profiling_models import wrap
from transformers.cache_utils import DynamicCache

from kvmix_cli.errors import ModelError
from kvmix_cli.models.attention import set_attention
from kvmix_cli.models.causality import check_causal, sees_no_later_token, trial_logits
from kvmix_cli.models.configuration import check_decoder
from kvmix_cli.models.loading import load_model
from kvmix_cli.models.sources import ASSETS

VOCABULARY = 4096
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO_STACKS = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
REFUSED = {
    "MiniMaxConfig": ({**SIZES, "num_key_value_heads": 2, "num_local_experts": 2}, "own"),
    "XLNetConfig": ({"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "XLNet"),
    "XLMConfig": ({"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4}, "transformers' cache"),
    "ReformerConfig": (
        {
            "vocab_size": VOCABULARY,
            "is_decoder": True,
            "hidden_size": 32,
            "axial_pos_shape": (8, 8),
            "axial_pos_embds_dim": (16, 16),
            "attn_layers": ["local", "lsh"],
            "num_attention_heads": 2,
            "attention_head_size": 16,
            "feed_forward_size": 48,
            "max_position_embeddings": 64,
            "num_buckets": 2,
        },
        "Reformer",
    ),
    "OpenAIGPTConfig": (GPT, "does not keep its keys and values in transformers' cache"),
    "BertConfig": (SIZES, "attends to later tokens, as an encoder does|is an encoder"),
    "RobertaConfig": (SIZES, "attends to later tokens, as an encoder does|is an encoder"),
    "WhisperConfig": ({**TWO_STACKS, "max_target_positions": 64}, r"is an encoder-decoder \(whisper\)"),
}
ENCODER_DECODERS = {
    "BlenderbotConfig": TWO_STACKS,
    "BigBirdPegasusConfig": TWO_STACKS,
    "ProphetNetConfig": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
KEEPS_ITS_OWN = {
    "GitConfig": {**SIZES, "vision_config": {**VISION, "image_size": 32, "patch_size": 16}},
    "BigBirdPegasusConfig": TWO_STACKS,
}


def is_causal(model):
    return sees_no_later_token(trial_logits(model, DynamicCache(config=model.config)))


def saved(config, folder):
    """A model folder of this configuration, with the built-in tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in (ASSETS / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def refused(folder):
    with warnings.catch_warnings(), pytest.raises(ModelError) as error:
        warnings.simplefilter("ignore")
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_cannot_be_used_are_refused_in_one_line(name, tmp_path):
    options, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = saved(getattr(transformers, name)(**options), tmp_path)
    assert re.search(message, refused(folder))


BLT = {
    "vocab_size": 260,
    "patch_in_forward": False,
    "patcher_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 260},
    "encoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 260},
    "decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 260},
    "global_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
}
BY_COMMAND = {
    **REFUSED,
    **{name: (options, "is an encoder-decoder") for name, options in ENCODER_DECODERS.items()},
    "BltConfig": (BLT, "has not one stack of decoder layers|no causal language model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_COMMAND)
def test_every_command_refuses_them_in_one_line_and_leaves_nothing(name, tmp_path, monkeypatch):
    options, message = BY_COMMAND[name]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, name)(**options)
        if name in REFUSED:
            saved(config, "model")
        else:  # refused by the configuration alone
            config.save_pretrained("model")
    for line in (
        ("profile", "./model", "--samples", 1, "--seq-len", 32),
        ("run", "./model", "--baseline", "--prompt", "x", "--max-new-tokens", 2),
        ("eval", "./model", "--baseline", "bf16", "--length", 48, "--prefix", 8, "--limit", 1),
    ):
        assert re.search(message, said_last(kvmix(*line))), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def said_last(ran):
    """The error of a command, its only one, after notices and warnings."""
    assert ran.exit_code == 1, ran.output
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert "bug in kvmix" not in ran.stderr
    *notices, error = ran.stderr.splitlines()
    assert error.startswith("kvmix: error: ")
    assert all(line.startswith("kvmix: ") for line in notices)
    return error


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_are_refused_by_name(name):
    config = getattr(transformers, name)(**ENCODER_DECODERS[name])
    with pytest.raises(ModelError, match=rf"^m is an encoder-decoder \({config.model_type}\)"):
        check_decoder(config, "m")


def test_an_encoder_is_refused_by_the_class_of_its_checkpoint():
    config = transformers.BertConfig(architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match=r"m is an encoder \(BertForMaskedLM\)"):
        check_decoder(config, "m")
    check_decoder(transformers.GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"]), "m")
    check_decoder(transformers.BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), "m")


def test_a_class_that_reads_one_token_at_a_time_is_refused(tmp_path):
    """ProphetNet's decoder alone; evaluations read several tokens at a time."""
    config = transformers.ProphetNetConfig(**ENCODER_DECODERS["ProphetNetConfig"])
    assert "does not run with transformers' key-value cache" in refused(saved(config, tmp_path))


def test_the_loss_is_that_of_the_next_token_whatever_the_class_makes_of_labels(tmp_path):
    """GIT cuts labels as if an image came first."""
    from kvmix_cli.profiling.run import run_profile

    config = transformers.GitConfig(**{**KEEPS_ITS_OWN["GitConfig"], "max_position_embeddings": 512})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_model(saved(config, tmp_path))
    found = run_profile(loaded, ["grad-norm"], texts=["one two three " * 90], source="text", samples=1, seq_len=64)
    assert all(layer.k.mean > 0 for layer in found.scores["grad-norm"].layers.values())


class TestCausality:
    @pytest.fixture
    def model(self):
        config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 97})
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    def test_a_decoder_is_causal(self, model):
        check_causal(model, "m")
        assert is_causal(model)

    def test_attention_to_later_tokens_is_seen(self, model):
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        model.set_attn_implementation("sdpa")
        model.model.config.is_causal = False
        assert not is_causal(model)
        with pytest.raises(ModelError, match="LlamaForCausalLM of m attends to later tokens"):
            check_causal(model, "m")

    def test_damaged_weights_are_left_to_whoever_measures(self, model):
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        assert is_causal(model)

    def test_running_out_of_memory_is_an_error(self, model):
        def full(*_):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

        model.register_forward_pre_hook(full)
        with pytest.raises(ModelError, match="no memory to run 3 tokens through m"):
            check_causal(model, "m")


@pytest.mark.filterwarnings("ignore:kvmix. attention over")
@pytest.mark.parametrize("name", ["GitConfig", "BigBirdPegasusConfig"])
def test_a_class_that_sees_later_tokens_with_another_attention_keeps_its_own(name, tmp_path):
    """Both make a mask for the implementations that they know only."""
    folder = saved(getattr(transformers, name)(**KEEPS_ITS_OWN[name]), tmp_path)
    with pytest.warns(UserWarning, match="attends to later tokens with .* 'kvmix' and keeps 'eager'"):
        loaded = load_model(folder)
    assert is_causal(loaded.model)
    set_attention(loaded.model, "kvmix")
    assert not is_causal(loaded.model), "this class has come to take it: choose another for this test"


@pytest.fixture
def fisher():
    """Fisher of a small model of this configuration, by layer."""
    from kvmix_cli.plan import CacheSettings
    from kvmix_cli.plan.windows import Recent
    from kvmix_cli.profiling.grid import Grid
    from kvmix_cli.profiling.measure import shared_pass
    from kvmix_cli.profiling.probes.fisher import Fisher

    sizes = {**SIZES, "hidden_size": 64, "vocab_size": 97, "num_key_value_heads": 2, "head_dim": 16}

    def measure(name, **options):
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**sizes, **options})
        loaded = wrap(transformers.AutoModelForCausalLM.from_config(config).eval())
        loaded.model.set_attn_implementation("kvmix")
        grid = Grid(bits=(2,), group_sizes=(16,), cache=CacheSettings(page=16, sink=2, window=Recent(tokens=8)))
        return shared_pass(loaded, [Fisher()], torch.arange(3, 60)[None], grid)["fisher"].layers

    return measure


def test_a_model_that_names_its_mask_is_observed(fisher):
    """AFMoE passes its mask by name."""
    layers = fisher("AfmoeConfig", layer_types=["full_attention"] * 2, num_dense_layers=2)
    assert all(pair.k.value > 0 and pair.v.value > 0 for pair in layers.values())


def test_a_bias_that_an_observer_would_miss_is_an_error(fisher):
    """Doge's mask depends on the values."""
    with pytest.raises(ModelError, match=r"layer 0 adds a bias of its own .*DogeAttention.*--score grad-norm"):
        fisher("DogeConfig")
