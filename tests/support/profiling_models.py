"""Small models of every way to arrange K and V projections, and a tokenizer that needs no files."""

import torch
import transformers
from transformers import BatchEncoding

from kvmix_cli.models.geometry import max_length, model_info
from kvmix_cli.models.loading import LoadedModel

VOCABULARY = 97
LAYERS, HIDDEN, HEADS, HEAD_DIM = 3, 32, 4, 8

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_SIZES, "num_key_value_heads": 2, "head_dim": HEAD_DIM}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {**_SIZES, "bias": False, "alibi": False}
_MPT = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 128}

SEPARATE = {
    "llama": ("LlamaConfig", _GQA),
    "qwen2": ("Qwen2Config", _SIZES | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GQA),
    "opt": ("OPTConfig", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "dropout": 0.5}),
    "gptj": ("GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "gpt_neo": ("GPTNeoConfig", _SIZES | {"attention_types": [[["global"], LAYERS]]}),
    "bert": ("BertLMHeadModel", _SIZES | {"is_decoder": True}),
}
FUSED = {
    "phi3": ("Phi3Config", _SIZES | {"num_key_value_heads": 2, "sliding_window": None}),
    "gpt2": ("GPT2Config", _GPT2),
    "mpt": ("MptConfig", _MPT),
    "dbrx": (
        "DbrxConfig",
        {
            **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 128},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        },
    ),
    "gpt_bigcode, multi-query": ("GPTBigCodeConfig", _GPT2 | {"multi_query": True}),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2 | {"multi_query": False}),
    "codegen": ("CodeGenConfig", _GPT2 | {"rotary_dim": 4}),
    "jetmoe": (
        "JetMoeConfig",
        _SIZES | {"kv_channels": HEAD_DIM, "num_key_value_heads": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "persimmon": ("PersimmonConfig", _SIZES | {"qk_layernorm": False}),
    "falcon": ("FalconConfig", _FALCON | {"multi_query": False}),
    "falcon, multi-query": ("FalconConfig", _FALCON | {"multi_query": True}),
    "falcon, new": ("FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
FAMILIES = {**SEPARATE, **FUSED}


class ByteTokenizer:
    """Every byte of the text is a token; a start token comes first if `bos` is true."""

    def __init__(self, bos=False):
        self.bos_token_id = 1
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if self.bos and add_special_tokens else []
        return BatchEncoding({"input_ids": start + [3 + byte % (VOCABULARY - 3) for byte in text.encode()]})


def build_config(family):
    name, options = FAMILIES[family]
    return getattr(transformers, name.replace("LMHeadModel", "Config"))(**options)


def load(family="llama", dtype=torch.float32, bos=False, seed=0, **changes) -> LoadedModel:
    """A model with random weights that are large enough for its gradients to be."""
    config = build_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return wrap(model.to(dtype).eval(), bos)


def wrap(model, bos=False) -> LoadedModel:
    return LoadedModel(model, ByteTokenizer(bos), model_info(model.config, "small"), max_length(model.config))


def token_ids(count, seed=0):
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))
