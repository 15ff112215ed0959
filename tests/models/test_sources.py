"""One name for each model, and one clear line for each place that holds none."""

from pathlib import Path

import huggingface_hub
import pytest
from commandline import kvmix
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from warned import warns_once

from kvmix_cli.errors import ModelError
from kvmix_cli.models import configuration, loading, multimodal
from kvmix_cli.models.loading import load_info
from kvmix_cli.models.sources import ASSETS, canonical_id, explain, has_pickles, has_weights, locate, meta_sibling
from kvmix_cli.network import HTTP_ERROR

META = ["params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk"]


def test_a_folder_has_one_name_however_it_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert {canonical_id(name) for name in ("m", "m/", "./m", "elsewhere/../m", "link", str(folder))} == {str(folder)}
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert canonical_id("../m") == str(folder)


@pytest.mark.parametrize("model_id", ["builtin:tiny", "meta-llama/Llama-2-7b-hf", "gpt2", "x" * 300, "a\0b"])
def test_other_names_stay_as_they_are(model_id):
    assert canonical_id(model_id) == model_id


def test_the_name_of_a_folder_is_that_of_its_profile(tmp_path, monkeypatch):
    (tmp_path / "m").symlink_to(ASSETS / "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_info("m") == load_info("./m/") == load_info(str(ASSETS / "tiny"))


@pytest.mark.parametrize("name", ["llama.Q4_K_M.gguf", "org/repository/model.GGUF", "./no/such.gguf"])
def test_a_gguf_file_that_is_not_there_is_named_as_such(name):
    with pytest.raises(ModelError, match=r"no file .*GGUF file that is on this machine, its folder, or the hub id"):
        locate(name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (META, r"has Meta's own layout .* whose name ends in -hf, or convert"),
        (["a.gguf", "b.gguf"], r"holds 2 GGUF files \(a.gguf, b.gguf\): give one of them"),
        (["params.json"], "has no config.json"),
    ],
)
def test_a_folder_in_another_layout_is_told_what_to_do(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=message) as error:
        locate(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """A hub of repositories by name, each a list of its files; those with a config.json are builtin:tiny."""
    repositories = {}

    def list_repo_files(repository):
        if repository not in repositories:
            raise OSError("no such repository")
        return repositories[repository]

    def file_exists(repository, name):
        return name in repositories.get(repository, [])

    real = configuration.AutoConfig.from_pretrained

    def from_pretrained(source, **options):
        if Path(source).is_dir():
            return real(source, **options)
        if not file_exists(source, "config.json"):
            raise OSError(f"{source} does not appear to have a file named config.json.")
        return real(str(ASSETS / "tiny"))

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "file_exists", file_exists)
    monkeypatch.setattr(configuration.AutoConfig, "from_pretrained", from_pretrained)
    return repositories


@pytest.mark.parametrize("ask", [lambda: meta_sibling("org/model"), lambda: has_pickles("org/model")])
def test_no_network_is_no_answer(monkeypatch, ask):
    """The HTTP library beneath the hub has errors of its own, which are no OSError."""

    def no_network(*args, **options):
        raise HTTP_ERROR("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", no_network)
    assert not ask()


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def no_network(source, **options):
        asked.append(source)
        raise OSError("We couldn't connect to the hub") from LocalEntryNotFoundError("no network")

    monkeypatch.setattr(configuration.AutoConfig, "from_pretrained", no_network)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", no_network)
    with pytest.raises(ModelError, match="couldn't connect to the hub; check the name and the network"):
        load_info("org/model")
    assert asked == ["org/model"]


def test_metas_layout_on_the_hub_leads_to_the_repository_beside_it(hub):
    hub["meta-llama/Llama-2-7b"] = META
    hub["meta-llama/Llama-2-7b-hf"] = ["config.json", "model.safetensors"]
    with warns_once(UserWarning, match=r"Llama-2-7b has Meta's own layout.*: using meta-llama/Llama-2-7b-hf"):
        info = load_info("meta-llama/Llama-2-7b")
    assert info.id == "meta-llama/Llama-2-7b-hf"
    with pytest.raises(ModelError, match="without --revision abc"):
        load_info("meta-llama/Llama-2-7b", revision="abc")


@pytest.mark.slow
def test_a_model_is_profiled_by_the_name_that_users_type(hub, monkeypatch, tmp_path):
    hub["meta-llama/Llama-2-7b"] = META
    hub["meta-llama/Llama-2-7b-hf"] = ["config.json", "model.safetensors"]
    for auto in (loading.AutoTokenizer, multimodal.AutoModelForCausalLM):
        real = auto.from_pretrained
        monkeypatch.setattr(
            auto, "from_pretrained", lambda _, real=real, **options: real(str(ASSETS / "tiny"), **options)
        )
    monkeypatch.chdir(tmp_path)
    ran = kvmix("profile", "meta-llama/Llama-2-7b", "--samples", 1, "--seq-len", 64, "--device", "cpu")
    assert ran.exit_code == 0, ran.stderr
    assert "using meta-llama/Llama-2-7b-hf" in ran.stderr
    assert kvmix("allocate", "--avg-bits", 2.3).exit_code == 0
    plan = kvmix("inspect", "rank-2.3", "--json")
    assert '"model": "meta-llama/Llama-2-7b-hf"' in plan.stdout


def test_weights_are_on_this_machine_if_their_files_are(tmp_path, monkeypatch):
    assert has_weights("builtin:tiny")
    assert has_weights(str(tmp_path))
    cached = {"org/one": "model.safetensors", "org/many": "model.safetensors.index.json"}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name, revision=None: f"/cache/{name}" if cached.get(repo) == name else None,
    )
    assert has_weights("org/one")
    assert has_weights("org/many")
    assert not has_weights("org/none")


def test_pickles_on_the_hub_are_found(hub):
    hub.update({"org/m": ["config.json", "pytorch_model.bin"], "org/both": ["a.bin", "model.safetensors"]})
    assert [has_pickles(name) for name in ("org/m", "org/both", "org/none")] == [True, False, False]


@pytest.mark.parametrize(
    "repositories",
    [
        {"org/m": META},
        {"org/m": ["params.json", "model.bin"], "org/m-hf": ["config.json"]},
        {"org/m-hf": ["config.json"]},
        {"org/m": [*META, "config.json"], "org/m-hf": ["config.json"]},
    ],
)
def test_nothing_is_put_in_the_place_of_another_layout(hub, repositories):
    hub.update(repositories)
    assert meta_sibling("org/m") is None


def test_a_gated_repository_has_a_licence_page():
    denied = OSError("You are trying to access a gated repo.\nMake sure to have access to it.")
    denied.__cause__ = GatedRepoError.__new__(GatedRepoError)
    told = explain("meta-llama/Llama-2-7b-hf", denied)
    assert "accept its licence at https://" in told
    assert "/meta-llama/Llama-2-7b-hf, then log in with `hf auth login`" in told
    assert "\n" not in told
