"""`kvmix allocate`: budgets, settings, the file it writes, and what it shows."""

import errno
import os
import re
from pathlib import Path

import pytest
from made_up import falling, make_info, make_profile

from kvmix_cli.allocation import METHODS
from kvmix_cli.plan import Plan

pytestmark = pytest.mark.usefixtures("profiled")
PLANS = "profiles/org--model/plans"


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / PLANS).iterdir())


def test_writes_a_plan_that_says_how_it_was_made(kvmix, tmp_path):
    ran = kvmix("allocate", "--avg-bits", 2.3)
    path = tmp_path / PLANS / "rank-2.3.yaml"
    assert ran.code == 0
    assert path.read_text().startswith("# kvmix allocate --avg-bits 2.3\nformat: kvmix-plan/1\n")
    plan = Plan.load(path)
    assert plan.short == "0-5:k3v2,6-25:k2v2,26-31:k2v4"
    assert plan.provenance["method"] == "rank"


def test_a_plan_is_written_through_a_link_that_is_named(kvmix, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "mine.yaml").symlink_to("shared/plan.yaml")
    (tmp_path / "profile.yaml").symlink_to("profiles/org--model/profile.yaml")
    ran = kvmix("allocate", "--avg-bits", 2.3, "--profile", "profile.yaml", "--out", "mine.yaml", "--json")
    assert ran.json["plan"] == str(tmp_path / "shared" / "plan.yaml")
    assert (tmp_path / "mine.yaml").is_symlink()
    assert Plan.load(tmp_path / "mine.yaml") == Plan.load(tmp_path / "shared" / "plan.yaml")


def test_shows_runs_bits_and_bytes(kvmix):
    ran = kvmix("allocate", "--avg-bits", 2.3, "--context", 8192, "--batch", 3)
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["0-5", "6", "3", "2"] in lines
    assert ["6-25", "20", "2", "2"] in lines
    assert "nominal 2.281 (K 2.188, V 2.375), stored 2.781" in ran.out
    assert "at 8192 tokens x 3 sequences" in ran.out
    assert f"{PLANS}/rank-2.3.yaml" in ran.out
    used, method = ran.err.splitlines()
    assert used == "kvmix: using profile profiles/org--model/profile.yaml"
    assert method == (
        "kvmix: method rank, the paper's; for plans that lose less, run `kvmix profile org/model --score fisher-metric`"
    )


def test_json_has_the_promised_keys_as_numbers(kvmix):
    ran = kvmix("allocate", "--avg-bits", 2.3, "--context", 8192, "--json")
    result = ran.json
    assert result["command"] == "allocate"
    assert result["model"] == "org/model"
    assert result["plan"] == f"{PLANS}/rank-2.3.yaml"
    assert result["method"] == "rank"
    assert result["bits"] == {"nominal": 2.28125, "nominal_k": 2.1875, "nominal_v": 2.375, "stored": 2.78125}
    assert result["layers"][0] == {"index": 0, "k_bits": 3, "k_group_size": 64, "v_bits": 2, "v_group_size": 64}
    assert result["predicted_loss"] is None
    assert len(result["layers"]) == 32
    plan = Plan.load(Path(result["plan"]))
    assert result["bytes"]["cache"] == plan.cache_bytes(8192).total


def test_same_command_same_file(kvmix, tmp_path):
    path = tmp_path / PLANS / "rank-2.3.yaml"
    kvmix("allocate", "--avg-bits", 2.3)
    first = path.read_bytes()
    kvmix("allocate", "--avg-bits", 2.3)
    assert path.read_bytes() == first


def test_paper_preset(kvmix):
    result = kvmix("allocate", "--preset", "paper", "--json").json
    assert (result["bits"]["nominal_k"], result["bits"]["nominal_v"]) == (2.1875, 2.375)
    assert result["plan"] == f"{PLANS}/paper.yaml"
    kvmix("inspect", result["plan"])


def test_the_papers_preset_has_two_names(kvmix):
    first, second = (kvmix("allocate", "--preset", name, "--json").json for name in ("paper", "kvmix-paper"))
    assert second["plan"] == f"{PLANS}/kvmix-paper.yaml"
    assert [second[key] for key in ("layers", "bits", "provenance")] == [
        first[key] for key in ("layers", "bits", "provenance")
    ]
    assert first["provenance"]["budget"] == {"share": 0.2}


def test_a_preset_without_a_share_of_layers(kvmix):
    ran = kvmix("allocate", "--preset", "kivi-2")
    assert ran.code == 2
    assert "use paper, block-gtq, eigen, kvmix-paper" in " ".join(ran.err.replace("│", " ").split())


def test_what_the_paper_compares_with_is_one_option_away(kvmix, tmp_path):
    kvmix("allocate", "--preset", "paper", "--method", "uniform")
    kvmix("allocate", "--preset", "paper", "--method", "random", "--seed", 3)
    kvmix("allocate", "--preset", "paper", "--window", "none", "--name", "no-rpc")
    assert names(tmp_path) == ["no-rpc.yaml", "paper-random-seed3.yaml", "paper-uniform.yaml"]
    uniform, random, bare = (Plan.load(tmp_path / PLANS / name) for name in reversed(names(tmp_path)))
    assert uniform.short == "0-31:k2v2"
    assert random.bits.nominal == 2.28125
    assert bare.cache.window.kind == "none"
    assert bare.cache.page == 32


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--avg-bits", "3"], "rank-3"),
        (["--stored-bits", "3.25"], "rank-stored-3.25"),
        (["--memory", "1GiB", "--context", "65536", "--batch", "2"], "rank-1GiB-65536x2"),
        (["--avg-bits", "2.5", "--method", "random", "--seed", "7"], "random-2.5-seed7"),
        (["--avg-bits", "2.5", "--method", "uniform"], "uniform-2.5"),
        (["--avg-bits", "2.5", "--name", "mine"], "mine"),
        (["--stored-bits", "3", "--method", "ilp"], "ilp-stored-3"),
        (["--avg-bits", "2.5", "--method", "cut"], "cut-2.5"),
    ],
)
def test_names_of_plans(kvmix, tmp_path, args, name):
    assert kvmix("allocate", *args).code == 0
    assert names(tmp_path) == [f"{name}.yaml"]


def test_settings_of_the_cache(kvmix, tmp_path):
    ran = kvmix(
        *("allocate", "--avg-bits", 3, "--group-size", "row", "--page", 64, "--sink", 0, "--window", "recent:16"),
        *(
            "--scale-dtype",
            "bfloat16",
            "--encode",
            "fitted",
            "--k-bits",
            "4,1",
            "--v-bits",
            "2",
            "--out",
            "there/plan.yaml",
        ),
    )
    assert ran.code == 0
    plan = Plan.load(tmp_path / "there" / "plan.yaml")
    cache = plan.cache.model_dump()
    assert cache["window"] == {"kind": "recent", "tokens": 16}
    assert (cache["page"], cache["sink"], cache["group_size"], cache["scale_dtype"]) == (64, 0, "row", "bfloat16")
    assert cache["encode"] == "fitted"
    assert "encode fitted (K refit, V search)" in ran.out
    assert {layer.k.bits for layer in plan.layers.values()} <= {1, 4}


@pytest.mark.slow
def test_a_name_depends_on_the_options_and_on_nothing_else(kvmix, tmp_path):
    """Options that are not in the name add a hash, so that no plan replaces another one."""
    for _ in range(2):
        for args in ([], ["--page", 64], ["--page", 64, "--k-bits", "2,4"], ["--with", "mikv"], ["--batch", 4]):
            assert kvmix("allocate", "--avg-bits", 3, *args).code == 0
        found = names(tmp_path)
        assert len(found) == 4
        assert {"rank-3.yaml", "rank-3+mikv.yaml"} <= set(found)
        assert all(re.fullmatch(r"rank-3(-[0-9a-f]{6}|\+mikv)?\.yaml", name) for name in found)


@pytest.mark.parametrize("text", ["128K", "131072"])
def test_a_context_may_be_in_thousands(kvmix, text):
    assert kvmix("allocate", "--avg-bits", 3, "--context", text, "--json").json["bytes"]["context"] == 131072


@pytest.mark.slow
def test_a_family_never_becomes_the_default_plan(kvmix):
    make_curves = kvmix("allocate", "--method", "uniform", "--avg-bits", 3)
    assert make_curves.code == 0
    kvmix("allocate", "--method", "pareto")
    assert "uniform-3" in kvmix("export", "--to", "kvtuner").err


@pytest.mark.parametrize(
    ("size", "count"), [("1GiB", 2**30), ("1G", 2**30), ("15.5 MB", 15_500_000), ("70000000", 7e7)]
)
def test_sizes(kvmix, size, count):
    ran = kvmix("allocate", "--memory", size, "--context", 1024, "--json", "--page", 16)
    assert ran.json["provenance"]["budget"]["memory"] == count
    assert ran.json["bytes"]["cache"] <= count


@pytest.mark.parametrize("asked", ["0", "-1", "nan", "99", "1.99", "inf"])
def test_impossible_budgets_state_the_range(kvmix, tmp_path, asked):
    ran = kvmix("allocate", "--avg-bits", asked)
    assert ran.code == 1
    assert "reach 2 to 8; widen the range with --k-bits and --v-bits" in ran.error
    assert ran.out == ""
    assert not (tmp_path / PLANS).exists()


def test_impossible_memory(kvmix):
    ran = kvmix("allocate", "--memory", "1MiB")
    assert ran.code == 1
    assert "no plan fits 1 MiB at 32768 tokens x 1" in ran.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--avg-bits", "2.3", "--preset", "paper"],
        ["--avg-bits", "2.3", "--stored-bits", "3"],
        ["--avg-bits", "2.3", "--max-loss", "1%"],
        ["--max-loss", "0.005"],
        ["--max-loss", "-1%"],
        ["--max-loss", "%"],
        ["--method", "pareto", "--avg-bits", "3"],
        ["--method", "pareto", "--preset", "paper"],
        ["--method", "pareto", "--out", "plan.yaml"],
        ["--avg-bits", "3", "--group-size", "32,4"],
        ["--avg-bits", "3", "--group-size", "32,,64"],
        ["--avg-bits", "3", "--trials", "0"],
        ["--avg-bits", "x"],
        ["--preset", "papr"],
        ["--memory", "8XB"],
        ["--memory", "-1"],
        ["--memory", "8i"],
        ["--avg-bits", "3", "--k-bits", "2;3"],
        ["--avg-bits", "3", "--k-bits", ""],
        ["--avg-bits", "3", "--page", "100"],
        ["--avg-bits", "3", "--sink", "-1"],
        ["--avg-bits", "3", "--group-size", "col"],
        ["--avg-bits", "3", "--group-size", "4"],
        ["--avg-bits", "3", "--scale-dtype", "float32"],
        ["--avg-bits", "3", "--name", "../x"],
        ["--avg-bits", "3", "--name", ""],
        ["--avg-bits", "3", "--context", "0"],
        ["--avg-bits", "3", "--batch", "0"],
        ["--avg-bits", "3", "--frob"],
        ["2.3"],
    ],
)
def test_wrong_usage(kvmix, tmp_path, args):
    ran = kvmix("allocate", *args)
    assert ran.code == 2
    assert "Usage: kvmix allocate" in ran.err
    assert ran.out == ""
    assert not (tmp_path / PLANS).exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "rnak"], "unknown method 'rnak' (did you mean 'rank'?)"),
        (["--score", "loss"], "it has no score 'loss', only grad-norm"),
        (["--window", "all"], "unknown window 'all': use recent:TOKENS, rpc or none"),
        (["--k-bits", "2,5"], "k_bits must be taken from 1, 2, 3, 4, 8, 16, got 2, 5"),
        (["--profile", "gone.yaml"], "gone.yaml does not exist"),
        (["--pin", "0,99:k8v8"], "--pin does not fit org/model: layer 99 cannot be planned: the model has layers 0-31"),
        (["--pin", "k8v8"], "'k8v8' is no pin: write it like 0,-1:k8v8 or 0-3:k4v2"),
        (["--min-bits", "5", "--max-bits", "7"], "k_bits 2, 3, 4, 8 have none of 5 to 7 bits"),
        (["--max-bits", "0"], "k_bits 2, 3, 4, 8 have none of 2 to 0 bits"),
        (["--model", "other"], "no profile in profiles/other: make one with `kvmix profile other`"),
    ],
)
def test_errors_say_what_to_do(kvmix, args, message):
    ran = kvmix("allocate", "--avg-bits", 3, *args)
    assert ran.code == 1
    assert message in ran.error
    assert ran.out == ""


def test_a_faulty_profile(kvmix, profiled):
    profiled.write_text(profiled.read_text().replace("mean: 32.0", "mean: .nan", 1))
    ran = kvmix("allocate", "--avg-bits", 3)
    assert ran.code == 1
    assert "line 11: scores.grad-norm.layers.0.k.mean: should be a finite number, got nan" in ran.error


def test_a_plan_in_place_of_the_profile(kvmix):
    kvmix("allocate", "--preset", "paper")
    ran = kvmix("allocate", "--avg-bits", 3, "--profile", f"{PLANS}/paper.yaml")
    assert ran.code == 1
    assert "format must be 'kvmix-profile/1', got 'kvmix-plan/1'" in ran.error


def test_the_only_score_is_taken_whatever_its_name(kvmix, profiled):
    make_profile([1.0, 2.0], name="loss").save(profiled)
    assert kvmix("allocate", "--avg-bits", 3, "--json").json["provenance"]["score"] == "loss"


def test_a_model_without_full_attention(kvmix, profiled):
    text = falling(2).to_yaml().split("      0: ")[0].replace("    layers:\n", "    layers: {}\n")
    profiled.write_text(text.replace("head_dim: 64", "head_dim: 64, stock: {0: linear_attention, 1: linear_attention}"))
    ran = kvmix("allocate", "--avg-bits", 3)
    assert ran.code == 1
    assert "org/model has no layer to plan: every layer keeps its stock cache" in ran.error


def test_stock_layers_are_mentioned(kvmix, profiled):
    make_profile([1.0, 2.0], info=make_info(3, stock={1: "sliding_attention"})).save(profiled)
    assert "own caches of 1 layer without full attention" in kvmix("allocate", "--avg-bits", 3).out


def test_a_full_disk_leaves_nothing(kvmix, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    ran = kvmix("allocate", "--avg-bits", 3)
    assert ran.code == 1
    assert (
        "cannot write profiles/org--model/plans/rank-3.yaml: No space left on device; no file was changed" in ran.error
    )
    assert ran.out == ""
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made(kvmix, tmp_path):
    (tmp_path / "file").write_text("x")
    ran = kvmix("allocate", "--avg-bits", 3, "--out", "file/plan.yaml")
    assert ran.code == 1
    assert "cannot write file/plan.yaml" in ran.error


def test_quiet_is_quiet(kvmix):
    assert kvmix("allocate", "--avg-bits", 3, "-q").err == ""


def test_verbose_shows_where_an_error_came_from(kvmix):
    ran = kvmix("allocate", "--avg-bits", 99, "-v")
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("kvmix: error: no plan has 99")


def test_help_names_all_methods(kvmix):
    assert all(name in kvmix("allocate", "--help").out for name in METHODS)


def by_heads(tmp_path):
    """A profile whose score has two KV heads in each of four layers, the second worth more."""
    profile = falling(4)
    score = profile.scores["grad-norm"]
    layers = {
        index: layer.model_copy(
            update={kind: getattr(layer, kind).model_copy(update={"heads": [1.0, 3.0 + index]}) for kind in "kv"}
        )
        for index, layer in score.layers.items()
    }
    scores = {"grad-norm": score.model_copy(update={"layers": layers})}
    profile.model_copy(update={"scores": scores}).save(tmp_path / "heads.yaml")
    return "--profile", "heads.yaml"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--by-head", "whole:0.5", "--with", "streaming-512"), "head 1: all kept"),
        (("--by-head", "budgets", "--with", "h2o-512"), "kept"),
        (("--by-head", "widths", "--method", "ilp"), "heads of their own"),
    ],
)
def test_what_heads_have_of_their_own(kvmix, tmp_path, options, shown):
    ran = kvmix("allocate", *by_heads(tmp_path), "--avg-bits", 3, *options, "--out", "plan.yaml")
    assert ran.code == 0, ran.err
    assert shown in ran.out
    plan = Plan.load(tmp_path / "plan.yaml")
    assert any(layer.head_groups for layer in plan.layers.values())
    assert plan.provenance["by_head"] == options[1].replace("budgets", "budgets")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by-head", "whole"), "use widths, budgets, budgets:SURE or whole:SHARE"),
        (("--by-head", "whole:2"), "use widths, budgets, budgets:SURE or whole:SHARE"),
        (("--by-head", "budgets"), "need a number of tokens to keep: add --with h2o-512"),
    ],
)
def test_heads_that_cannot_be_given_anything(kvmix, tmp_path, options, message):
    ran = kvmix("allocate", *by_heads(tmp_path), "--avg-bits", 3, *options)
    assert ran.code in (1, 2)
    assert message in " ".join(ran.err.replace("│", " ").split())


@pytest.mark.usefixtures("profiled")
def test_a_file_that_is_no_plan_is_not_replaced(kvmix, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    ran = kvmix("allocate", "--avg-bits", 3, "--out", "notes.txt")
    assert ran.code == 1
    assert "notes.txt is there and is no plan: remove it, or name another file with --out" in ran.error
    assert (tmp_path / "notes.txt").read_text() == "precious"
    (tmp_path / "damaged.yaml").write_text("# by hand\nformat: kvmix-plan/1\n")
    assert "was another plan, and is replaced" in kvmix("allocate", "--avg-bits", 3, "--out", "damaged.yaml").err
    for stream in ("/dev/stdout", "-"):
        assert "name a file" in kvmix("allocate", "--avg-bits", 3, "--out", stream).error
