"""The frame around the commands: light to start, one line for an error, the promised exit codes."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import forking
import pytest
from made_up import falling
from typer.main import get_command

from kvmix_cli import __version__, allocation, console, errors, main
from kvmix_cli.main import app

COMMANDS = [
    "profile",
    "allocate",
    "run",
    "eval",
    "report",
    "inspect",
    "fit",
    "export",
    "recommend",
    "demo",
    "list",
    "env",
]
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


@pytest.mark.slow
@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(args):
    ran = forking.run(*args, code=LIGHT, imports=forking.LIGHT)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: kvmix" in ran.stdout + ran.stderr or __version__ in ran.stdout


@pytest.mark.slow
def test_allocate_loads_no_torch(profiled):
    script = LIGHT.replace(repr(HEAVY), repr(("torch", "transformers")))
    args = ["allocate", "--avg-bits", "2.3", "--profile", str(profiled)]
    ran = forking.run(*args, code=script, imports=forking.LIGHT)
    assert ran.returncode == 0, ran.stderr
    assert "nominal 2.281" in ran.stdout


def test_help_names_every_command(kvmix):
    for flag in ("-h", "--help"):
        out = kvmix(flag).out
        assert [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()] == COMMANDS


def test_version(kvmix):
    assert kvmix("--version").out == f"kvmix {__version__}\n"


@pytest.mark.parametrize("args", [["frob"], ["--frob"], ["allocate", "--frob"], ["run", ""], ["run", "--plan="]])
def test_wrong_usage_is_2(kvmix, args):
    ran = kvmix(*args)
    assert ran.code == 2
    assert ran.out == ""
    ran = kvmix(*args, "--json")
    assert ran.code == 2
    assert ran.json["error"]["type"] == "UsageError"


@pytest.mark.parametrize("option", ["--plan", "--model", "--prompt-file", "--profiles-dir", "--uniform"])
def test_a_value_without_a_character_is_not_taken_for_none(kvmix, option):
    """As that of a shell's variable that is not set: the newest plan would be taken in its place."""
    for args in ([option, "", "--json"], [f"{option}=", "--json"]):
        ran = kvmix("run", "--prompt", "x", *args)
        assert ran.code == 2
        assert f"the value of {option} is empty: write one, or leave it out" in ran.json["error"]["message"]
    assert kvmix("run", "--prompt", "--x=", "--plan", "gone.yaml").code == 1
    assert "the prompt is empty" in kvmix("run", "--plan", "gone.yaml", "--prompt", "").error


@pytest.mark.parametrize(
    ("args", "said", "counts"),
    [
        (["run", "--plan=a.yaml", "--prompt", "x", "--plan", "b.yaml"], "--plan is given 2 times", "b.yaml"),
        (["inspect", "--model", "x", "c.yaml", "--model", "x"], "--model is given 2 times", "c.yaml"),
        (["eval", "--plan", "d.yaml", "--plan", "e.yaml", "--json", "--json"], None, "d.yaml"),  # of many, and flags
    ],
)
def test_of_an_option_given_twice_the_last_value_counts_and_that_is_said(kvmix, args, said, counts):
    ran = kvmix(*args)
    assert ran.code == 1
    assert counts in ran.error
    assert (f"kvmix: {said}: the last one counts" in ran.err) if said else ("times" not in ran.err)
    assert "times" not in kvmix(*args, "-q").err


@pytest.mark.parametrize(("command", "argument"), [("report", "DIR"), ("inspect", "FILE2"), ("export", "PLAN")])
def test_help_shows_arguments_without_types_of_python(kvmix, command, argument):
    out = kvmix(command, "--help").out
    assert f" [{argument}]" in out.splitlines()[0]
    assert any(line.split()[0] == argument and "<" not in line for line in out.splitlines() if line.strip())


def kinds(kind):
    """An error and those below it, of the tree in errors.py."""
    below = (child for child in kind.__subclasses__() if child.__module__ == errors.__name__)
    return [kind, *(each for child in below for each in kinds(child))]


@pytest.mark.parametrize("kind", kinds(errors.KvmixError))
def test_every_error_is_one_line_and_1(kvmix, monkeypatch, profiled, kind):
    message = "what\nhappened\x1b[31m"
    arguments = {errors.DocumentError: ("file", [message]), errors.UnknownTaskError: ("x", message)}
    error = kind(*arguments.get(kind, (message,)))

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


@pytest.fixture
def broken(monkeypatch, profiled):
    """An `allocate` with a bug in it."""

    def divide(*args, **options):
        return 1 // 0

    monkeypatch.setattr(allocation, "allocate", divide)


@pytest.mark.usefixtures("broken")
def test_a_bug_is_one_line_that_says_what_to_report(kvmix):
    ran = kvmix("allocate", "--avg-bits", 3, "-q")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("kvmix: error: this is a bug in kvmix: ZeroDivisionError: integer division or modulo by")
    assert "commands/allocate.py:" in ran.err
    assert "please report it with this line, the output of the same command with --traceback" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("option", ["--traceback", "-v"])
def test_the_traceback_of_a_bug_is_an_option(kvmix, option):
    ran = kvmix("allocate", "--avg-bits", 3, option)
    assert ran.code == 1
    assert "Traceback (most recent call last)" in ran.err
    assert "return 1 // 0" in ran.err


@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_no_memory_is_one_line_and_no_bug(kvmix, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(allocation, "allocate", full)
    ran = kvmix("allocate", "--avg-bits", 3, "--json", "-q")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert ran.err.startswith("kvmix: error: out of memory (")
    assert "use a smaller model" in ran.json["error"]["message"]


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("args", "code", "kind", "said"),
    [
        (["--avg-bits", 3], 1, "ZeroDivisionError", "this is a bug in kvmix"),
        (["--avg-bits", 99, "--profile", "gone.yaml"], 1, "StateError", "gone.yaml does not exist"),
        ([], 2, "UsageError", "give exactly one budget"),
        (["--avg-bits", "x"], 2, "UsageError", "Invalid value for '--avg-bits'"),
        (["--frob"], 2, "UsageError", "No such option"),
        (["--avg-bits", 3, "--dtype", "int4"], 1, "ModelError", "unknown dtype 'int4'"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_error_under_json_is_one_object(kvmix, args, code, kind, said, first):
    ran = kvmix("allocate", *(["--json", *args] if first else [*args, "--json"]))
    assert ran.code == code
    assert ran.json["command"] == "allocate"
    assert ran.json["error"]["type"] == kind
    assert said in ran.json["error"]["message"]
    assert said in ran.err


@pytest.mark.usefixtures("profiled")
def test_an_interrupt_under_json_is_one_object(kvmix, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(allocation, "allocate", interrupted)
    ran = kvmix("allocate", "--avg-bits", 3, "--json")
    assert ran.code == 130
    assert ran.json["command"] == "allocate"
    assert ran.json["error"] == {"type": "Interrupted", "message": "interrupted"}


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["allocate", "--avg-bits", 3, "--k-bits", "2,4", "-q"], {"avg_bits": 3, "k_bits": [2, 4], "context": 32768}),
        (["inspect", "profiles/org--model/profile.yaml"], {"file": "profiles/org--model/profile.yaml"}),
        (["export", "--to", "vllm", "--traceback"], {"to": "vllm"}),
        (["report", "nowhere"], {"folders": ["nowhere"]}),
        (["profile", "org/model", "--granularity", "row"], {"model": "org/model", "granularity": "row"}),
        (["run", "--model", "org/model", "--prompt", "x", "--temperature", "nan"], {"model": "org/model"}),
        (["fit", "builtin:tiny", "--avg-bits", "nan"], {"avg_bits": ["nan"]}),
        (["eval", "--length", "0"], {"length": 0, "output_dir": "results"}),
        (["recommend", "builtin:none", "--max-loss", "2%"], {"model": "builtin:none", "max_loss": 0.02}),
        (["demo", "--out", "/dev/null/demo", "--quick"], {"out": "/dev/null/demo", "quick": True}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_says_its_schema_its_version_and_the_options(kvmix, profiled, args, options):
    found = kvmix(*args, "--json").json
    assert found["command"] == args[0]
    assert (found["schema"], found["kvmix"]) == ("kvmix-json/1", __version__)
    assert {name: found["options"].get(name) for name in options} == options
    assert not {"ctx", "json", "quiet", "traceback"} & set(found["options"])


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


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(tmp_path):
    path = falling(2000).save(tmp_path / "profile.yaml")
    reader, writer = os.pipe()
    os.close(reader)
    ran = forking.run("inspect", path, imports=forking.LIGHT, stdout=writer)
    os.close(writer)
    assert ran.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux")
def test_a_full_disk_under_stdout(tmp_path):
    path = falling(4).save(tmp_path / "profile.yaml")
    with Path("/dev/full").open("wb") as full:
        ran = forking.run("inspect", path, imports=forking.LIGHT, stdout=full)
    assert ran.returncode == 1
    assert ran.stderr.startswith("kvmix: error: cannot write the output: No space left on device")


def test_the_package_is_a_command():
    ran = subprocess.run([sys.executable, "-m", "kvmix_cli", "--version"], capture_output=True, text=True, check=False)
    assert ran.stdout == f"kvmix {__version__}\n"


BOARD_FAULTS = [
    ["--scores", "losss"],
    ["--methods", "ilpp"],
    ["--methods", "uniform"],
    ["--stored-bits", "99"],
    ["--task", "recall"],
    ["--group-size", "7"],
    ["--output-dir", "ranked.yaml"],
]
"""Options of a leaderboard that do not fit the profile, or name what is not there."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["eval", "--leaderboard", "--plan", "x"],
        ["eval", "--scores", "kl"],
        ["eval", "--step", "0"],
        ["eval", "--leaderboard", "--length", "1K,2K"],
        ["eval", "--length", "1K,2K", "--contexts", "512"],
        ["recommend"],
        ["recommend", "builtin:tiny", "--max-loss", "1"],
        ["eval"],
        ["run"],
        ["run", "--prompt", "x", "--top-p", "2"],
        ["run", "--prompt", "x"],
        ["run", "--prompt-file", "/dev/zero"],
        ["profile"],
        ["profile", "builtin:tiny", "--granularity", "token"],
        ["profile", "builtin:tiny", "--dtype", "int4"],
        ["profile", "builtin:tiny", "--threads", "0"],
        ["allocate", "--method", "pareto", "--out", "x"],
        ["allocate", "--avg-bits", "3", "--k-bits", "x"],
        ["allocate", "--avg-bits", "3", "--page", "7"],
        ["export", "--to", "nowhere"],
        ["demo", "--samples", "0"],
        *(["eval", "--leaderboard", *args, "--profile", "ranked.yaml"] for args in BOARD_FAULTS),
    ],
)
def test_wrong_options_are_refused_without_torch(tmp_path, args):
    script = LIGHT.replace(repr(HEAVY), repr(("torch", "transformers", "matplotlib")))
    falling(4).save(tmp_path / "ranked.yaml")
    ran = forking.run(*args, code=script, imports=forking.LIGHT, cwd=tmp_path)
    assert ran.returncode == 0, f"loaded {ran.stderr}"
    assert "rror: " in ran.stderr


@pytest.mark.slow
def test_threads_that_wait_are_passive_unless_the_user_says_otherwise():
    script = "import os; from kvmix_cli.main import main\ntry: main()\nfinally: print(os.environ['OMP_WAIT_POLICY'])"
    for given, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        command = [sys.executable, "-c", script, "--version"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.stdout.splitlines()[-1] == policy


@pytest.mark.slow
def test_termination_is_an_interrupt(tmp_path):
    said, journal = tmp_path / "said.txt", tmp_path / "profiles" / "builtin--tiny" / "profile.partial.jsonl"
    with said.open("w") as stderr, Path(os.devnull).open("w") as nowhere:
        arguments = ("profile", "builtin:tiny", "--samples", 200)
        process = forking.start(*arguments, cwd=tmp_path, stdout=nowhere, stderr=stderr)
    deadline = time.monotonic() + 120
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 130
    assert said.read_text() == "kvmix: interrupted; continue with `kvmix profile builtin:tiny --samples 200 --resume`\n"


@pytest.mark.parametrize("place", ["kvmix_cli.main.with_settings", "typer.main.get_command"])
def test_an_interrupt_before_a_command_begins_is_one_line(monkeypatch, capsys, place):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(sys, "argv", ["kvmix", "list", "plans"])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "kvmix: interrupted\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a shell's >&-")
def test_a_closed_stdout_is_one_line(tmp_path):
    command = f"{sys.executable} -m kvmix_cli inspect x >&-"
    ran = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "kvmix: error: cannot write the output: stdout is closed\n")


def test_an_argument_that_is_not_utf8_is_a_usage_error(kvmix):
    ran = kvmix("run", "--prompt", "a\udcff")
    assert ran.code == 2
    assert "argument 3 is not valid UTF-8: b'a\\xff'" in ran.err


@pytest.mark.parametrize("args", [["allocate", "--name", "x\x1b]0;y\x07\nz"], ["run", "--no\x1b[31m\nz"]])
def test_a_usage_error_is_one_line_and_nothing_a_terminal_obeys(kvmix, args):
    ran = kvmix(*args)
    assert ran.code == 2
    assert "\x1b" not in ran.err
    assert ran.err.count("\n") <= 4
    assert ran.err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_a_program_is_an_interruption_unless_it_is_ignored(monkeypatch, name):
    number = getattr(signal, name)

    def gone(*args):
        raise errors.OutputError("the terminal is closed")

    monkeypatch.setattr(main, "app", lambda **options: os.kill(os.getpid(), number))
    monkeypatch.setattr(console, "_write", gone)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 130
        assert signal.getsignal(number) is signal.SIG_IGN
        main.main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_two_examples_that_the_command_takes(kvmix, name):
    *_, first, second = kvmix(name, "--help").out.rstrip().splitlines()
    for line in (first, second):
        program, command, *args = shlex.split(line)
        assert (program, command) == ("kvmix", name)
        options = {option for parameter in get_command(app).commands[name].params for option in parameter.opts}
        assert {arg for arg in args if arg.startswith("--")} <= options


def test_completion_can_be_installed(kvmix):
    assert "--install-completion" in kvmix("--help").out


@pytest.mark.parametrize(
    "args",
    [
        ("allocate", "--avg-bits", 3, "--out"),
        ("allocate", "--avg-bits", 3, "--profile"),
        ("run", "--prompt", "x", "--plan"),
        ("inspect",),
        ("export", "--to", "vllm"),
        ("list", "plans", "--profiles-dir"),
        ("report",),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line_and_no_bug(kvmix, profiled, args):
    ran = kvmix(*args, "y" * 300 + ".yaml", "--json")
    assert ran.code == 1
    assert "bug" not in ran.err
    assert "File name too long" in ran.json["error"]["message"]
