"""The command line in an empty folder, with the profile of a made-up model if a test wants one."""

import json
from dataclasses import dataclass
from functools import partial

import pytest
from evaluating import Counting, shallow, tiny
from made_up import falling
from typer.testing import CliRunner

from kvmix_cli import console, evaluation, profiling, state
from kvmix_cli.evaluation import base
from kvmix_cli.main import app
from kvmix_cli.models import loading, sources
from kvmix_cli.studies import demo


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The one object on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def error(self):
        """The last line of stderr, which must be the error's only one."""
        lines = self.err.splitlines()
        assert sum("error:" in line.lower() for line in lines) == 1, self.err
        return lines[-1]


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch, less_text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(state.ENVIRONMENT, raising=False)
    monkeypatch.setattr(console, "mode", console.Mode())
    monkeypatch.setattr(state, "_chosen", None)


@pytest.fixture
def kvmix():
    """Run a command: `kvmix("allocate", "--avg-bits", 2.3)`."""

    def run(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="kvmix")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def profiled(tmp_path):
    """The saved profile of org/model: 32 layers, keys falling and values rising in importance."""
    return falling(32).save(tmp_path / "profiles" / "org--model" / "profile.yaml", "kvmix profile org/model")


@pytest.fixture
def loaded_once(monkeypatch):
    """Commands get the built-in model that all tests share, in float32 on the CPU."""
    monkeypatch.setattr(loading, "load_model", lambda *arguments, **options: tiny())


@pytest.fixture(scope="session")
def shallow_assets(tmp_path_factory):
    """Where the built-in model has its first two layers alone."""
    folder = tmp_path_factory.mktemp("assets")
    shallow().model.save_pretrained(folder / "tiny")
    shallow().tokenizer.save_pretrained(folder / "tiny")
    return folder


@pytest.fixture
def loaded_shallow(monkeypatch, shallow_assets):
    """The built-in model has two layers, and commands get the one that all tests share: a third of the work."""
    monkeypatch.setattr(sources, "ASSETS", shallow_assets)
    monkeypatch.setattr(loading, "load_model", lambda *arguments, **options: shallow())


@pytest.fixture
def short_demo(monkeypatch):
    """The demo with texts of 448 tokens instead of 1024, and an answer of 8."""
    monkeypatch.setattr(base, "Settings", partial(base.Settings, length=448))
    monkeypatch.setattr(profiling, "run_profile", partial(profiling.run_profile, seq_len=448))
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)


@pytest.fixture
def counting(monkeypatch):
    """A task that takes no time, in the place of perplexity: `number` is 17.5 unquantized, 3.5 at 2 bits."""
    task = Counting()
    monkeypatch.setattr(evaluation, "get_task", lambda name, options=None: task)
    return task
