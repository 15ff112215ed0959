"""Settings of `generation_config.json` that checkpoints have, none of which may change an answer."""

GENERATION_FILES = (
    {"eos_token_id": 1, "pad_token_id": 2, "use_cache": False},
    {"pad_token_id": 5000},
    {"cache_implementation": "static"},
    {"num_beams": 4},
    {"num_beams": 4, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2, "temperature": 3.0, "top_k": 3},
)
