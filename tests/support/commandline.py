"""Calling `kvmix` inside the test's process."""

import functools
import json

from typer import testing
from typer.testing import CliRunner, Result

from kvmix_cli.main import app

# Once a process: making every command and option of the app anew takes longer than many a command itself.
testing._get_command = functools.cache(testing._get_command)

TINY = ("--model", "builtin:tiny", "--device", "cpu")
"""The built-in model, as options."""


def kvmix(*arguments: object, stdin: str = "") -> Result:
    """Run a command; `exit_code`, `stdout` and `stderr` of the result are those of a shell."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="kvmix")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def kvmix_json(*arguments: object, code: int = 0, stdin: str = "") -> dict:
    """Run a command with `--json`: exactly one object on stdout, in one line."""
    result = kvmix(*arguments, "--json", stdin=stdin)
    assert result.exit_code == code, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refused(result: Result, code: int = 1) -> str:
    """The one line that a command says when it refuses; nothing is on stdout."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *notices, error = result.stderr.splitlines()
    assert error.startswith("kvmix: error: "), result.stderr
    assert all(line.startswith("kvmix: ") for line in notices)
    return error.removeprefix("kvmix: error: ")
