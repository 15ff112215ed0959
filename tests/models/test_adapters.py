"""LoRA adapters: merged into their model, or one line."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvmix_cli.errors import ModelError
from kvmix_cli.models.loading import load_info, load_model
from kvmix_cli.models.sources import ASSETS

RANK, SCALE = 4, 2.0


def write(folder, base=ASSETS / "tiny", layers=8, out=128, **settings):
    """An adapter of all value projections, as peft saves one."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK * SCALE,
        "target_modules": ["v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    torch.manual_seed(0)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, 256) * 0.1
        weights[f"{name}.lora_B.weight"] = torch.randn(out, RANK) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


def failure(folder):
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestWithPeft:
    @pytest.fixture(autouse=True)
    def _peft(self):
        pytest.importorskip("peft")

    @pytest.mark.slow
    def test_its_weights_are_added(self, tmp_path):
        folder = write(tmp_path / "adapter")
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        plain, merged = load_model("builtin:tiny", dtype="float32"), load_model(folder, dtype="float32")
        assert type(merged.model) is type(plain.model)
        for layer in (0, 7):
            name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
            change = SCALE * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
            one, other = (each.model.model.layers[layer].self_attn.v_proj.weight for each in (plain, merged))
            assert torch.allclose(other, one + change, atol=1e-5), "float32"

    def test_the_model_has_the_adapters_name_and_the_bases_shape(self, tmp_path):
        folder = write(tmp_path / "adapter", base="builtin:tiny")
        info = load_model(folder).info
        assert info == load_info(folder)
        assert info.model_copy(update={"id": "builtin:tiny"}) == load_info("builtin:tiny")
        assert info.id == folder

    @pytest.mark.parametrize(
        "change",
        [{"out": 64}, {"layers": 9}, {"layers": 7}, {"target_modules": ["query_key_value"]}, {"peft_type": "NONE"}],
    )
    def test_one_for_another_model_is_refused(self, tmp_path, change):
        message = failure(write(tmp_path / "adapter", **change))
        assert message.startswith(f"the adapter {tmp_path / 'adapter'} does not fit {ASSETS / 'tiny'}, the model that")

    @pytest.mark.parametrize("content", [b"", b"garbage", None])
    def test_damaged_weights(self, tmp_path, content):
        weights = Path(write(tmp_path / "adapter")) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000] if content is None else content)
        assert "the adapter" in failure(str(tmp_path / "adapter"))

    def test_pickled_weights_are_not_read(self, tmp_path):
        folder = Path(write(tmp_path / "adapter"))
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        assert "has no adapter_model.safetensors: pickled adapters are not read" in failure(str(folder))


def test_without_peft(tmp_path, monkeypatch):
    folder = write(tmp_path / "adapter")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else real(name, *more))
    assert failure(folder) == (
        f"{folder} is a LoRA adapter of {ASSETS / 'tiny'}, merged by peft: pip install 'kvmix[lora]'"
    )


@pytest.mark.parametrize(
    "settings", ["{", "[]", "{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": 3}']
)
def test_a_configuration_that_names_no_model(tmp_path, settings):
    folder = write(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(settings)
    assert "adapter_config.json of the adapter" in failure(folder)


def test_a_model_that_is_not_there(tmp_path):
    assert "no folder /no/such/model" in failure(write(tmp_path / "adapter", base="/no/such/model"))


def test_an_adapter_of_an_adapter(tmp_path):
    inner = write(tmp_path / "inner")
    assert f"is an adapter of {inner}, which is an adapter itself" in failure(write(tmp_path / "outer", base=inner))
    assert "is an adapter itself" in failure(write(tmp_path / "own", base=tmp_path / "own"))


def test_a_merged_model_with_its_adapter_beside_it_is_a_model(tmp_path):
    folder = Path(write(tmp_path / "adapter"))
    for file in (ASSETS / "tiny").iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    assert load_model(str(folder)).info.layers == 8
