"""GGUF files: the model inside is the model that they were made from, and a file that is cut off is one line."""

import importlib.util
import struct

import gguf_files
import pytest
import torch
from commandline import kvmix, kvmix_json, refused

from kvmix_cli import state
from kvmix_cli.errors import ModelError
from kvmix_cli.models import gguf
from kvmix_cli.models.loading import load_info, load_model

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def plain():
    return load_model("builtin:tiny")


def logits(loaded):
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        return loaded.model(ids).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("is_folder", [False, True])
def test_the_model_inside_is_the_one_it_was_made_from(file, plain, is_folder):
    loaded = load_model(str(file.parent if is_folder else file), dtype="float32")
    assert loaded.info.model_copy(update={"id": "builtin:tiny"}) == plain.info
    assert torch.allclose(logits(loaded), logits(plain), atol=1e-3), "the same weights in float32"
    text = "It was a bright cold day in April, and the clocks were striking 13."
    assert loaded.tokenizer(text).input_ids[-20:] == plain.tokenizer(text).input_ids[-20:]


@pytest.mark.slow
def test_loading_is_silent(file, capfd):
    load_model(str(file))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_packed_weights_are_unpacked(tmp_path, plain):
    loaded = load_model(str(gguf_files.write(tmp_path / "tiny-Q8_0.gguf", "Q8_0")), dtype="float32")
    found, wanted = logits(loaded), logits(plain)
    assert (found - wanted).norm() < 0.05 * wanted.norm(), "8 bits are close"
    assert not torch.equal(found, wanted)


@pytest.mark.slow
def test_a_file_has_one_name_and_a_folder_of_its_own(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_info("model.gguf").id == load_info("./model.gguf").id == str(file)
    assert state.slug("model.gguf") == state.slug(str(file))
    assert state.slug(str(file)) != state.slug("elsewhere/model.gguf")


@pytest.mark.slow
def test_the_commands_take_a_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--samples", 1, "--seq-len", 64, "--dtype", "float32")
    assert kvmix_json("profile", file, *options)["model"] == str(file)
    kvmix_json("allocate", "--avg-bits", 3)
    run = kvmix_json("run", file, "--prompt", "one two three", "--max-new-tokens", 3, "--dtype", "float32")
    assert run["new_tokens"] == 3


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_one_line(file, tmp_path, share):
    cut = tmp_path / "model.gguf"
    content = file.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    error = refused(kvmix("run", cut, "--baseline", "--prompt", "one"))
    assert str(cut) in error
    assert "cut off" in error
    if share >= 0.5:
        assert f"it has {cut.stat().st_size} of {len(content)} bytes" in error


@pytest.mark.parametrize("at", range(4, 64, 3))
def test_a_damaged_header_is_one_line(file, tmp_path, at):
    content = bytearray(file.read_bytes()[:200_000])
    content[at : at + 8] = b"\xff" * 8
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError) as error:
        load_info(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [3, 20, 60])
def test_a_file_that_ends_in_its_header_says_where(file, tmp_path, size):
    (tmp_path / "model.gguf").write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=f"it ends within its header, at byte {size}"):
        load_info(str(tmp_path))


NESTED = struct.pack("<IIQ", gguf.ARRAY, gguf.ARRAY, 1) + struct.pack("<IQ", gguf.ARRAY, 1) * 5000
"""An array of an array of an array, 5,000 deep."""
TEXT = struct.pack("<IQ", gguf.STRING, 5) + b"seven"


@pytest.mark.parametrize(
    ("value", "said"),
    [(NESTED, "recursion"), (TEXT, "general.alignment is 'seven'"), (struct.pack("<II", 4, 0), "alignment is 0")],
)
def test_an_odd_value_of_the_header_is_one_line(tmp_path, value, said):
    key = b"general.alignment"
    head = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key))
    (tmp_path / "model.gguf").write_bytes(head + key + value)
    with pytest.raises(ModelError, match=rf"is no GGUF file, or is cut off \(.*{said}") as error:
        load_info(str(tmp_path))
    assert "\n" not in str(error.value)


def test_something_else_is_no_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no gguf" * 100)
    with pytest.raises(ModelError, match="is no GGUF file, or is cut off"):
        load_info(str(tmp_path))


def test_the_file_of_a_folder(file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(file)
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\): give one of them"):
        load_info(str(tmp_path))
    (tmp_path / "model.gguf").symlink_to(file)
    assert load_info(str(tmp_path)).layers == 8


def test_without_its_packages(file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs gguf and accelerate: pip install 'kvmix\[gguf\]'"):
        gguf.check_gguf(file)
