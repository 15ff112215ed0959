import dataclasses

import pytest
from coding import falling_widths, made_up_basis
from commandline import TINY, kvmix, kvmix_json, refused
from evaluating import save_plan, tiny, uniform

from kvmix_cli.decoding import generate
from kvmix_cli.models import loading as models
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TransformSettings, TransformTensor
from kvmix_cli.texts import prompts

KEYS = {
    "command": str,
    "model": str,
    "plan": str,
    "text": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "prompt_tokens_per_s": float,
    "decode_tokens_per_s": float,
    "cache_bytes": int,
    "bf16_cache_bytes": int,
    "compression": float,
}
PROMPT = "import os\n\ndef walk(folder):\n"


pytestmark = pytest.mark.usefixtures("loaded_once")


def test_the_json_object_has_the_stable_keys():
    result = kvmix_json("run", *TINY, "--uniform", 2, "--prompt", PROMPT * 20, "--max-new-tokens", 8)
    assert {name: type(result[name]) for name in KEYS} == KEYS
    assert (result["command"], result["model"], result["plan"]) == ("run", "builtin:tiny", "uniform-2")
    assert result["new_tokens"] == 8
    assert result["layers"] == {"quantized": 8, "total": 8, "full_precision": 0, "stock": {}}
    assert result["compression"] == result["bf16_cache_bytes"] / result["cache_bytes"]
    assert result["compression_same_dtype"] == result["unquantized_cache_bytes"] / result["cache_bytes"]
    assert result["quantized_share"] > 0
    tokens = result["prompt_tokens"] + result["new_tokens"] - 1
    assert result["bf16_cache_bytes"] == 2 * 2 * 8 * 2 * 64 * tokens
    assert result["unquantized_cache_bytes"] == 2 * result["bf16_cache_bytes"]


def test_layers_that_are_not_quantized_are_listed():
    save_plan("mixed", Plan.from_short("0-5:k2v2,6-7:k16v16", tiny().info))
    result = kvmix("run", "--plan", "mixed", "--prompt", PROMPT, "--max-new-tokens", 2)
    assert "quantized 6 of 8 layers; 2 at 16 bits, not quantized" in result.stderr


@pytest.mark.slow
def test_text_comes_on_stdout_then_a_table():
    wanted = kvmix_json("run", *TINY, "--baseline", "--prompt", PROMPT, "--max-new-tokens", 20)
    result = kvmix("run", *TINY, "--baseline", "--prompt", PROMPT, "--max-new-tokens", 20)
    assert result.exit_code == 0
    assert result.stdout.startswith(wanted["text"])
    for word in ("run with unquantized", "prompt", "decode", "tokens/s", "against bf16", "smaller"):
        assert word in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_the_baseline_is_the_unquantized_cache_and_16_bits_write_the_same():
    baseline = kvmix_json("run", *TINY, "--baseline", "--prompt", PROMPT, "--max-new-tokens", 20)
    full = kvmix_json("run", *TINY, "--uniform", 16, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert (baseline["plan"], full["plan"]) == ("unquantized", "uniform-16")
    assert baseline["text"] == full["text"]
    assert baseline["cache_bytes"] == full["cache_bytes"] == 2 * full["bf16_cache_bytes"]
    assert baseline["compression"] == 0.5, "the built-in model is in float32 on the CPU"


def test_the_prompt_may_come_from_a_file_or_from_stdin(tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = ("run", *TINY, "--baseline", "--max-new-tokens", 5)
    given = kvmix_json(*options, "--prompt", PROMPT)
    for result in (
        kvmix_json(*options, "--prompt-file", "prompt.txt"),
        kvmix_json(*options, "--prompt-file", "-", stdin=PROMPT),
    ):
        assert (result["text"], result["prompt_tokens"]) == (given["text"], given["prompt_tokens"])


@pytest.mark.slow
def test_the_newest_plan_is_taken_and_names_the_model():
    save_plan("first", uniform(4))
    options = ("run", "--prompt", PROMPT, "--max-new-tokens", 3)
    result = kvmix(*options)
    assert "profiles/builtin--tiny/plans/first.yaml" in result.stderr
    assert kvmix_json(*options)["plan"] == "first"
    assert kvmix_json(*options, "--plan", "first")["model"] == "builtin:tiny"
    assert kvmix_json(*options, "--plan", "profiles/builtin--tiny/plans/first.yaml")["plan"] == "first"
    assert kvmix_json(*options, "--plan", "0-3:k4v4,4-7:k2v2")["plan"] == "0-3:k4v4,4-7:k2v2"


def test_uniform_takes_nothing_from_a_plan_that_is_not_named():
    save_plan("paged", uniform(4, CacheSettings(page=32)))
    result = kvmix("run", "--device", "cpu", "--uniform", 2, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert "using the model of plan profiles/builtin--tiny/plans/paged.yaml" in result.stderr
    assert "page, group and window: defaults" in result.stderr


def test_uniform_takes_its_pages_from_the_plan_that_is_given():
    path = save_plan("paged", uniform(4, CacheSettings(page=32)))
    options = ("run", *TINY, "--uniform", 2, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert "page, group and window: as in plan paged" in kvmix(*options, "--plan", path).stderr
    assert "page, group and window: defaults" in kvmix(*options).stderr


def test_a_cut_answer_is_announced(monkeypatch):
    small = dataclasses.replace(tiny(), max_length=len(tiny().tokenizer(PROMPT).input_ids) + 4)
    monkeypatch.setattr(models, "load_model", lambda *arguments, **options: small)
    result = kvmix("run", *TINY, "--baseline", "--prompt", PROMPT)
    assert result.exit_code == 0
    assert f"at most 4 new tokens: the model's limit is {small.max_length}, prompt included" in result.stderr
    assert kvmix_json("run", *TINY, "--baseline", "--prompt", PROMPT)["max_new_tokens"] == 4


def test_a_run_that_quantized_nothing_says_so_even_if_quiet():
    result = kvmix("run", *TINY, "-q", "--uniform", 2, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert "nothing was quantized" in result.stderr


@pytest.mark.slow
def test_quiet_prints_the_text_and_nothing_else():
    options = ("run", *TINY, "--uniform", 2, "--prompt", PROMPT * 20, "--max-new-tokens", 8)
    result = kvmix(*options, "-q")
    assert (result.stdout, result.stderr) == (kvmix_json(*options)["text"] + "\n", "")


def test_a_short_prompt_shows_what_the_plan_saves_at_the_full_context():
    options = ("run", *TINY, "--uniform", 2, "--prompt", PROMPT, "--max-new-tokens", 2)
    whole = kvmix_json(*options)["full_context"]
    plan = uniform(2, CacheSettings())
    assert whole["tokens"] == 4096
    assert whole["cache_bytes"] == plan.cache_bytes(4096, element_bytes=4).total
    assert whole["unquantized_cache_bytes"] == plan.unquantized_bytes(4096, element_bytes=4)
    assert "at the model's full context of 4096 tokens: " in kvmix(*options).stdout
    assert kvmix_json("run", *TINY, "--baseline", "--prompt", PROMPT, "--max-new-tokens", 2)["full_context"] is None


def test_generated_text_does_not_reach_the_terminal_as_commands(monkeypatch):
    def speak(loaded, ids, cache, *, on_text, **options):
        on_text("a\x1b[31mb\x07\tc\n\x9b2Jd")
        return real(loaded, ids, cache, **options)

    real = generate.generate
    monkeypatch.setattr(generate, "generate", speak)
    result = kvmix("run", *TINY, "--baseline", "--prompt", PROMPT, "--max-new-tokens", 2)
    assert result.stdout.startswith("a?[31mb?\tc\n?2Jd")


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    options = ("run", *TINY, "--baseline", "--max-new-tokens", 2)
    wanted = kvmix_json(*options, "--prompt", PROMPT)["prompt_tokens"]
    assert kvmix_json(*options, "--prompt-file", "prompt.txt")["prompt_tokens"] == wanted
    assert kvmix_json(*options, "--prompt-file", "-", stdin="\ufeff" + PROMPT)["prompt_tokens"] == wanted


def test_a_prompt_has_a_most_size(monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "MAX_BYTES", 2**20)
    (tmp_path / "long.txt").write_bytes(b"x" * (2**20 + 1))
    for name in ("long.txt", "-"):
        said = refused(kvmix("run", *TINY, "--baseline", "--prompt-file", name, stdin="x" * (2**20 + 1)))
        assert "has more than 1 MiB; shorten it" in said
    (tmp_path / "long.txt").write_bytes(b"x" * 2**20)
    longest = max(map(len, tiny().tokenizer.get_vocab()))
    said = refused(kvmix("run", *TINY, "--baseline", "--prompt-file", "long.txt"))
    assert f"the model's limit of 4096 tokens holds at most {4096 * longest}: shorten it" in said


def test_a_chat_template_is_applied(monkeypatch):
    monkeypatch.setattr(
        tiny().tokenizer, "chat_template", "<{{ messages[0].content }}>{% if add_generation_prompt %}:{% endif %}"
    )
    chat = kvmix_json("run", *TINY, "--baseline", "--chat", "--prompt", "x", "--max-new-tokens", 4)
    plain = kvmix_json("run", *TINY, "--baseline", "--prompt", "<x>:", "--max-new-tokens", 4)
    assert (chat["prompt_tokens"], chat["text"]) == (plain["prompt_tokens"], plain["text"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--baseline", "--prompt", ""), "the prompt is empty"),
        (("--baseline", "--prompt", " \n "), "the prompt is empty"),
        (("--baseline", "--prompt-file", "-"), "the prompt is empty"),
        (("--baseline", "--prompt-file", "nowhere.txt"), "cannot read the prompt from nowhere.txt: No such file"),
        (("--baseline", "--prompt-file", "."), "cannot read the prompt from .: Is a directory"),
        (("--baseline", "--prompt-file", "binary"), "binary is a binary file: give UTF-8 text"),
        (("--baseline", "--prompt-file", "latin"), "latin is not UTF-8 text (byte 1): convert it first"),
        (("--baseline", "--prompt-file", "/dev/zero"), "cannot read the prompt from /dev/zero: it is a device"),
        (("--baseline", "--prompt-file", "a\0b"), "cannot read the prompt from a?b: embedded null byte"),
        (("--baseline", "--prompt", "x", "--chat"), "builtin:tiny has no chat template"),
        (("--baseline", "--prompt", "x", "--temperature", "nan"), "--temperature must be 0"),
        (("--baseline", "--prompt", "x", "--top-p", "2"), "--top-p must be more than 0"),
        (("--baseline", "--prompt", "x " * 5000), "tokens and the model's limit, answer included, is 4096"),
        (("--prompt", "x"), "no plan"),
        (("--prompt", "x", "--plan", "missing"), "no plan"),
        (("--prompt", "x", "--plan", "missing.yaml"), "missing.yaml"),
        (("--prompt", "x", "--uniform", "5"), "must be one of 1, 2, 3, 4, 8, 16"),
        (("--prompt", "x", "--plan", "0-3:k2v2"), "no entry for layer 4-7"),
        (("--prompt", "x", "--plan", "0-8:k2v2"), "layer 8 cannot be planned"),
    ],
)
def test_bad_input_is_one_line(options, said, tmp_path):
    (tmp_path / "binary").write_bytes("in UTF-16".encode("utf-16-le"))
    (tmp_path / "latin").write_bytes("aé".encode("latin-1"))
    assert said in refused(kvmix("run", *TINY, *options))


def test_a_plan_for_another_model_is_refused():
    other = tiny().info.model_copy(update={"id": "other/model", "layers": 4})
    path = save_plan("other", uniform(2, info=other), "other--model")
    message = refused(kvmix("run", *TINY, "--prompt", "x", "--plan", path))
    assert "the plan was made for other/model, not for builtin:tiny: layers 4 against 8" in message


def test_a_faulty_plan_lists_its_faults_with_their_lines(tmp_path):
    path = tmp_path / "faulty.yaml"
    path.write_text(uniform(2).to_yaml().replace("k: {bits: 2}", "k: {bits: .nan}", 1) + "extra: 1\n")
    message = refused(kvmix("run", *TINY, "--prompt", "x", "--plan", path))
    assert "line 7: " in message
    assert "unknown key 'extra'" in message


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--prompt", "x", "--prompt-file", "y"),
        ("--prompt", "x", "--baseline", "--uniform", "2"),
        ("--prompt", "x", "--max-new-tokens", "0"),
        ("--prompt", "x", "--temperature", "warm"),
    ],
)
def test_wrong_usage_exits_with_2(options):
    result = kvmix("run", *TINY, *options)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.slow
def test_a_plan_of_transform_codes_finds_its_basis_from_any_folder(tmp_path):
    info = tiny().info
    folder = tmp_path / "elsewhere"
    sha256 = made_up_basis(info, frame=1024).save(folder / "basis.safetensors")
    tensor = TransformTensor(widths=falling_widths(info.kv_heads, info.head_dim))
    cache = CacheSettings(transform=TransformSettings(basis="basis.safetensors", sha256=sha256, frame=1024))
    plan = Plan.build(info, dict.fromkeys(range(info.layers), LayerPlan(k=tensor, v=tensor)), cache)
    path = plan.save(folder / "coded.yaml")
    result = kvmix_json("run", *TINY, "--plan", path, "--prompt", PROMPT * 40, "--max-new-tokens", 3)
    assert result["quantized_share"] > 0
    assert result["compression"] > 1
    alone = plan.save(tmp_path / "without its basis" / "coded.yaml")
    message = refused(kvmix("run", *TINY, "--plan", alone, "--prompt", PROMPT))
    assert "basis.safetensors: there is no such file; put the file back" in message
