"""Every example in the README and the docs is run: Python blocks, plan and profile files, and `$ kvmix` lines."""

import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest
from commandline import kvmix
from typer.main import get_command

from kvmix_cli.main import app
from kvmix_cli.plan import ModelInfo, Plan
from kvmix_cli.plan.document.strict_yaml import parse_yaml
from kvmix_cli.plan.engines.kvtuner import is_kvtuner
from kvmix_cli.plan.presets import Preset
from kvmix_cli.profile import Profile

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs").rglob("*.md")])
FOUR_LAYERS = ModelInfo(id="example/four-layers", layers=4, kv_heads=8, head_dim=128)
HUB = "meta-llama/Llama-2-7b"
SHORTER = {
    "profile": ["--samples", "1", "--seq-len", "288"],
    "run": ["--max-new-tokens", "8"],
    "eval": ["--limit", "1", "--length", "336"],
    "demo": ["--samples", "1", "--limit", "1"],
    "recommend": ["--dry-run"],
}
"""Added to the examples: the same work on less text."""
SMALLER = {
    HUB: "builtin:tiny",
    "512,1024,1536,2048,2560,3072": "336,384",
    "512,1024 --depths 5": "336,384 --depths 2",
    "0.25,0.5,0.75": "0.5",
    "--length 512 --limit 2": "--length 336 --limit 1",
}
"""What stands in the place of parts of the examples: a model that is there, and fewer and shorter contexts."""
FENCED = re.MULTILINE | re.DOTALL


def blocks(language):
    """(page, number, text) of every fenced block in a language."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        found += [pytest.param(page, text, id=f"{page.name}-{number}") for number, text in enumerate(texts)]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for text in found:
        exec(compile(text, str(page), "exec"), {})
    assert found or page.name != "plan-format.md"


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_file_examples_load(page, text, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(text)
    document = parse_yaml(text, str(page))
    if is_kvtuner(document):
        assert len(Plan.from_kvtuner(path, FOUR_LAYERS).layers) == 4
    elif document.data["format"].startswith("kvmix-profile"):
        assert Profile.load(path).scores
    elif document.data["format"].startswith("kvmix-preset"):
        assert Preset.load(path).plan(FOUR_LAYERS, "example").layers
    else:
        assert Plan.load(path).layers


@pytest.mark.slow
@pytest.mark.usefixtures("forgetful", "less_text")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_examples_run(page, tmp_path, monkeypatch):
    """In order, in one folder, with the files that the page shows and names in a comment at their head.

    There is less text, and the built-in model stands for one of the hub.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("A prompt of the user's own.\n")
    for name, text in re.findall(r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```", page.read_text(), FENCED):
        (tmp_path / name).write_text(text)
    lines = re.findall(r"^\$ (kvmix .*)$", page.read_text(), re.MULTILINE)
    for line in lines:
        smaller = functools.reduce(lambda text, part: text.replace(part, SMALLER[part]), SMALLER, line)
        arguments = shlex.split(smaller, comments=True)[1:]
        result = kvmix(*arguments, *SHORTER.get(arguments[0], []))
        assert result.exit_code == 0, f"{line}: {result.stderr}"
    assert lines or page != ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_have_the_options_shown(page):
    """In code of every kind, also what takes too long to be run here; names are checked, and no values."""
    for line in commands_in(page.read_text()):
        words = itertools.takewhile(lambda word: word not in ("|", "||", ">"), shlex.split(line, comments=True))
        _, name, *arguments = words
        command = get_command(app).get_command(None, name)
        if command is None:
            assert name.startswith("-"), f"there is no such command: {line}"
            continue
        context = command.context_class(command, info_name=name)
        _, left, _ = command.make_parser(context).parse_args(arguments)
        assert not set(left) - {"..."}, f"too many arguments: {line}"


def test_commands_are_found_on_many_pages():
    assert sum(len(list(commands_in(page.read_text()))) for page in PAGES) > 150


def commands_in(text):
    """Yield the calls of kvmix in the code of a page, fenced or indented, each in one line."""
    is_fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            for call in re.findall(r"^ *(?:\$ )?(?:[A-Z_]+=\S+ )*(kvmix [a-z-].*)", line):
                yield re.sub(r"\$\([^)]*\)", "", call)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
