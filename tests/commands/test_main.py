"""The frame around the commands: light to start, one line for an error, the promised exit codes."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from made_up import falling

from kvmix_cli import __version__, allocation, errors
from kvmix_cli.commands import options

COMMANDS = ["profile", "allocate", "run", "eval", "report", "inspect", "export", "demo"]
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "kvmix_cli.plan")
"""What costs time to import. Typer loads pydantic by itself, so only our models of it can be kept out."""
LIGHT = f"""
import sys
from kvmix_cli.main import main
sys.argv[0] = "kvmix"
try:
    main()
except SystemExit:
    pass
sys.exit(", ".join(name for name in {HEAVY} if name in sys.modules) or 0)
"""


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(args):
    ran = subprocess.run([sys.executable, "-c", LIGHT, *args], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: kvmix" in ran.stdout + ran.stderr or __version__ in ran.stdout


def test_allocate_loads_no_torch(profiled):
    script = LIGHT.replace(repr(HEAVY), repr(("torch", "transformers")))
    args = ["allocate", "--avg-bits", "2.3", "--profile", str(profiled)]
    ran = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "nominal 2.281" in ran.stdout


def test_help_names_every_command(kvmix):
    for flag in ("-h", "--help"):
        out = kvmix(flag).out
        assert [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()] == COMMANDS


def test_version(kvmix):
    assert kvmix("--version").out == f"kvmix {__version__}\n"


@pytest.mark.parametrize("args", [["frob"], ["--frob"], ["allocate", "--frob"]])
def test_wrong_usage_is_2(kvmix, args):
    ran = kvmix(*args)
    assert ran.code == 2
    assert ran.out == ""


def kinds(kind):
    """An error and those below it, of the tree in errors.py."""
    below = (child for child in kind.__subclasses__() if child.__module__ == errors.__name__)
    return [kind, *(each for child in below for each in kinds(child))]


@pytest.mark.parametrize("kind", kinds(errors.KvmixError))
def test_every_error_is_one_line_and_1(kvmix, monkeypatch, profiled, kind):
    message = "what\nhappened\x1b[31m"
    error = kind("file", [message]) if kind is errors.DocumentError else kind(message)

    def broken(*args, **options):
        raise error

    monkeypatch.setattr(allocation, "allocate", broken)
    ran = kvmix("allocate", "--avg-bits", 3, "-q")
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("kvmix: error: ")
    assert ran.err.endswith("what happened?[31m\n")


@pytest.mark.usefixtures("profiled")
def test_an_interrupt_is_130(kvmix, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(allocation, "allocate", interrupted)
    ran = kvmix("allocate", "--avg-bits", 3, "-q")
    assert (ran.code, ran.out, ran.err) == (130, "", "kvmix: interrupted\n")


@pytest.mark.usefixtures("profiled")
def test_a_bug_is_not_hidden(kvmix, monkeypatch):
    def broken(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(allocation, "allocate", broken)
    with pytest.raises(ZeroDivisionError):
        kvmix("allocate", "--avg-bits", 3)


@pytest.mark.usefixtures("profiled")
def test_warnings_are_one_line_each(kvmix, monkeypatch):
    def warning(*args, **options):
        warnings.warn("slow\npath", stacklevel=2)
        warnings.warn("for programmers", FutureWarning, stacklevel=2)
        raise errors.BudgetError("stop")

    monkeypatch.setattr(allocation, "allocate", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        ran = kvmix("allocate", "--avg-bits", 3, "-q")
    assert ran.err == "kvmix: warning: slow path\nkvmix: error: stop\n"


def test_a_closed_pipe_is_no_traceback(tmp_path):
    path = falling(2000).save(tmp_path / "profile.yaml")
    script = "from kvmix_cli.main import main; main()"
    command = [sys.executable, "-c", script, "inspect", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux")
def test_a_full_disk_under_stdout(tmp_path):
    path = falling(4).save(tmp_path / "profile.yaml")
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-c", "from kvmix_cli.main import main; main()", "inspect", str(path)]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("kvmix: error: cannot write the output: No space left on device")


@pytest.mark.parametrize("text", ["", "x", "8i", "8iB", "-1", "1e9", "8 G B", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(options.typer.BadParameter):
        options.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("17", 17), ("17B", 17), ("2k", 2048), ("2KB", 2000), ("2KiB", 2048), ("1.5gib", 3 * 2**29)],
)
def test_sizes(text, count):
    assert options.parse_bytes(text) == count
