"""Options that commands share: dataclasses that become a signature, and the forms of numbers, sizes and dtypes."""

import inspect
import os
import re
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvmix_cli import main
from kvmix_cli.commands import options, values


@dataclass(frozen=True)
class Size:
    """Two numbers, of which the second is at least the first."""

    low: Annotated[int, typer.Option(help="Smallest.")] = 1
    high: Annotated[int, typer.Option(help="Largest.")] = 9

    def __post_init__(self):
        if self.low > self.high:
            raise typer.BadParameter(f"{self.low} is more than {self.high}")


@dataclass(frozen=True)
class Named:
    """An argument, and an option without a default."""

    name: Annotated[str, typer.Argument()]
    kind: Annotated[str, typer.Option()]


@pytest.fixture
def app():
    seen = []

    @options.expand
    def command(ctx: typer.Context, named: Named, size: Size, loud: Annotated[bool, typer.Option("--loud")] = False):
        """Show what it was given."""
        seen.append((ctx.info_name, named, size, loud))

    typed = typer.Typer(rich_markup_mode=None)
    typed.command()(command)
    typed.seen = seen
    return typed


def test_fields_become_parameters_in_their_order(app):
    callback = app.registered_commands[0].callback
    assert list(inspect.signature(callback).parameters) == ["ctx", "name", "kind", "low", "high", "loud"]
    assert callback.__doc__ == "Show what it was given."


def test_a_command_gets_records(app):
    result = CliRunner().invoke(app, ["x", "--kind", "y", "--low", "3", "--loud"], prog_name="it")
    assert result.exit_code == 0, result.output
    assert app.seen == [("it", Named("x", "y"), Size(3, 9), True)]


@pytest.mark.parametrize("args", [["x"], ["--kind", "y"], ["x", "--kind", "y", "--low", "10"]])
def test_what_options_say_about_each_other_is_a_usage_error(app, args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert app.seen == []


@pytest.mark.parametrize("text", ["", "x", "8i", "8iB", "-1", "1e9", "8 G B", "nan", "٣"])
def test_what_is_not_a_size(text):
    with pytest.raises(typer.BadParameter):
        values.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("17", 17), ("17B", 17), ("2k", 2048), ("2KB", 2000), ("2KiB", 2048), ("1.5gib", 3 * 2**29)],
)
def test_sizes(text, count):
    assert values.parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), (7, 7), ("128K", 131072), ("128k", 131072), ("1.5Ki", 1536), ("2M", 2**21)]
)
def test_counts(text, count):
    assert values.count(1)(text) == count


@pytest.mark.parametrize("text", ["1_000", "1000", " 1_0_0_0 "])
def test_counts_and_sizes_may_have_underscores(text):
    assert values.parse_count(text) == values.parse_bytes(text) == 1000
    assert values.parse_bytes("1_0GiB") == 10 * 2**30


def test_every_count_of_every_command_has_all_spellings():
    """Only a seed is a count without units. No number is left to Typer, which does not say what was given."""
    seen = set()
    for command in main.app.registered_commands:
        for name, parameter in inspect.signature(command.callback).parameters.items():
            option = getattr(parameter.annotation, "__metadata__", (None,))[0]
            if not isinstance(option, typer.models.OptionInfo):
                continue
            is_number = re.search(r"\b(int|float)\b", str(parameter.annotation.__origin__))
            if is_number or parameter.annotation.__origin__ in (int, float):
                assert option.parser, (command.name, name)
                with pytest.raises(typer.BadParameter, match="'٣x' is not"):
                    option.parser("٣x")
            if option.metavar == "N" and name != "seed":
                assert option.parser("2k") == option.parser("2_048") == 2048, (command.name, name)
                seen.add(name)
    assert seen >= {"batch", "page", "sink", "limit", "trials", "repeats", "num_fewshot", "batch_size", "random_plans"}


def test_counts_inside_other_options():
    assert values.parse_groups("1_28,row,1K") == (128, "row", 1024)
    assert [values.parse_window(text) for text in ("recent:4K", "recent", "rpc", "recent:x")] == [
        *("recent:4096", "recent", "rpc", "recent:x")
    ]
    assert values.parse_batch("1k") == 1024


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "0.3K", "128KB", "-1", "0", "1e3", "nan", "9" * 30, "4G", "_1", "1__0"]
)
def test_what_is_not_a_count(text):
    with pytest.raises(typer.BadParameter):
        values.count(1)(text)


def test_numbers_and_seeds():
    assert [values.parse_number(text) for text in ("2.3", " .5 ", 3, "1e2")] == [2.3, 0.5, 3, 100]
    assert values.parse_width("4") == 4
    assert [values.parse_seed(text) for text in (7, "-1", "1_000", str(2**63 - 1))] == [7, -1, 1000, 2**63 - 1]


@pytest.mark.parametrize("text", ["", "1.5", "1e3", "nan", "x", "٣", str(2**63), str(-(2**63) - 1), "9" * 5000])
def test_what_is_no_seed(text):
    with pytest.raises(typer.BadParameter, match=r"is not a seed; write a whole number from -2\^63"):
        values.parse_seed(text)


def test_lists_of_counts_are_sorted():
    assert values.parse_counts("4K, 1024,4096") == (1024, 4096)
    with pytest.raises(typer.BadParameter, match="write it like 1024,4096 or 1K,4K"):
        values.parse_counts("1024,,2")


@pytest.mark.parametrize("text", ["2,3,8", "8, 3,2", "3,2,2,8,3"])
def test_lists_of_widths_are_sorted_so_that_equal_ones_name_one_plan(text):
    assert values.parse_bits(text) == (2, 3, 8)


@pytest.mark.parametrize(("text", "dtype"), [("bf16", "bfloat16"), ("FP16", "float16"), ("float32", "float32")])
def test_dtypes_have_several_names(text, dtype):
    assert values.parse_dtype(text) == dtype


@pytest.mark.parametrize("command", ["profile", "run", "eval", "allocate"])
def test_an_unknown_dtype_is_refused_before_anything_else(kvmix, command):
    args = {"run": ["--prompt", "x"], "allocate": ["--avg-bits", 3]}.get(command, [])
    ran = kvmix(command, *args, "--dtype", "bf61")
    assert ran.code == 1
    assert "unknown dtype 'bf61' (did you mean" in ran.error


class TestThreads:
    @pytest.fixture(autouse=True)
    def untouched(self, monkeypatch):
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.setenv(name, os.environ.get(name, "1"))
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("command", ["profile", "allocate", "run", "eval", "demo"])
    def test_a_number_out_of_the_range_is_one_line(self, kvmix, command):
        for number in (0, options.processors() + 1):
            ran = kvmix(command, "--threads", number)
            assert ran.code == 2
            assert f"{number} threads: this process has {options.processors()} processors" in ran.err

    def test_torch_and_what_is_loaded_later_use_so_many(self, kvmix, profiled):
        assert kvmix("allocate", "--avg-bits", 3, "--threads", 1).code == 0
        assert torch.get_num_threads() == 1
        assert os.environ["OMP_NUM_THREADS"] == "1"


class TestModel:
    def test_an_argument_and_an_option_are_the_same(self):
        for each in (options.ModelOptions("a"), options.ModelOptions(None, "a"), options.ModelOptions("a", "a")):
            assert each.model == "a"
        assert options.ModelOptions().model is None

    @pytest.mark.parametrize("command", ["profile", "run", "eval"])
    def test_two_different_models_are_a_usage_error(self, kvmix, command):
        more = ["--prompt", "x"] if command == "run" else []
        ran = kvmix(command, "org/a", "--model", "org/b", *more)
        assert ran.code == 2
        assert "two models, org/a and --model org/b: give one" in ran.err
