"""Models of the Llama family as GGUF files, written by llama.cpp's own package; builtin:tiny is one."""

import json

import torch
from safetensors.torch import load_file

from kvmix_cli.models.sources import ASSETS

TINY = ASSETS / "tiny"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path, kind="F32"):
    """Write builtin:tiny with weights of a kind: F32, or Q8_0 for its matrices."""
    config = json.loads((TINY / "config.json").read_text())
    return write_llama(path, config, load_file(TINY / "model.safetensors"), kind, _add_tokenizer)


def write_llama(path, config, weights, kind, add_tokenizer=None):
    """Write a model.

    Args:
        config: of transformers, as plain data.
        weights: tensors by transformers' names; without `lm_head`, the embedding is used in its place.
        kind: of matrices, as GGUF names it: F32, BF16, Q8_0, ...
        add_tokenizer: function that adds a vocabulary to a writer; without one a file has none.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if add_tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in weights.items():
        place = _place(name)
        weight = _permuted(weight, heads[place.split(".")[2]]) if "attn_q" in place or "attn_k" in place else weight
        data = weight.float().numpy()
        if kind != "F32" and weight.ndim == 2:
            form = GGMLQuantizationType[kind]
            writer.add_tensor(place, quants.quantize(data, form), raw_dtype=form)
        else:
            writer.add_tensor(place, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer):
    writer.add_name("tiny")
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_pad_token_id(vocabulary["<pad>"])


def _place(name):
    """The name of a weight in GGUF files: `blk.3.attn_q.weight`."""
    parts = name.removesuffix(".weight").split(".")
    if parts[1:2] == ["layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def _permuted(weight, heads):
    """Rows in the order of llama.cpp, which rotates neighbours where transformers rotates halves."""
    return torch.unflatten(weight, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
