"""`--preset`, `PLAN+PRESET` and `allocate --with`: rows, runs, plan files, and what does not go together."""

import re
from pathlib import Path

import pytest
from commandline import TINY, kvmix, kvmix_json, refused
from evaluating import save_plan, save_small, tiny, uniform
from learned_books import with_made_up_codebooks
from made_up import falling, make_info
from with_moments import save_with_moments

from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan import presets as preset
from kvmix_cli.state import profile_path

TINY_PROFILE = Path("profiles/builtin--tiny/profile.yaml")
PROMPT = "def f(x):\n" + "    x = x + 1\n" * 60


pytestmark = pytest.mark.usefixtures("loaded_once")


def bits(rows):
    return {row["plan"]: (row["nominal_bits"], row["stored_bits"]) for row in rows}


class TestEval:
    def test_presets_are_rows_by_their_names(self, counting):
        given = ("mikv", "mikv+rotate-2", "kivi-4")
        rows = kvmix_json("eval", *TINY, *(part for name in given for part in ("--preset", name)), "--uniform", 4)[
            "rows"
        ]
        assert [row["plan"] for row in rows] == ["unquantized", *given, "uniform-4"]
        assert bits(rows)["mikv"] == bits(rows)["mikv+rotate-2"] == (3.2, 4.2625)
        assert sorted(path.name[:-10] for path in Path("results").iterdir())[1:3] == [
            "counting__builtin--tiny__mikv",
            "counting__builtin--tiny__mikv+rotate-2",
        ]

    def test_the_papers_preset_by_its_second_name(self, counting):
        rows = kvmix_json("eval", *TINY, "--preset", "paper", "--preset", "kvmix-paper")["rows"]
        assert bits(rows)["paper"] == bits(rows)["kvmix-paper"]

    def test_every_preset_is_a_row(self, counting):
        profile = save_with_moments(TINY_PROFILE, tiny().info)
        with_made_up_codebooks(profile, TINY_PROFILE.parent).save(TINY_PROFILE)
        names = tuple(preset.presets())
        rows = kvmix_json("eval", *TINY, *(part for name in names for part in ("--preset", name)))["rows"]
        assert [row["plan"] for row in rows] == ["unquantized", *names]

    def test_a_preset_is_put_on_a_plan(self, counting):
        save_plan("named", uniform(4, CacheSettings(page=32, group_size=32)))
        rows = kvmix_json("eval", *TINY, "--plan", "named+mikv", "--plan", "0-7:k2v2+h2o")["rows"]
        assert list(bits(rows)) == ["unquantized", "named+mikv", "0-7:k2v2+h2o"]
        assert bits(rows)["named+mikv"] == (4.8, pytest.approx(0.2 * 9 + 0.8 * 5 + 1 / 16))
        assert bits(rows)["0-7:k2v2+h2o"] == (0.5, pytest.approx(0.25 * 3 + 1 / 16))

    def test_other_pages_are_announced(self, counting):
        save_plan("named", uniform(4, CacheSettings()))
        assert "pages of 32 tokens, as mikv needs, instead of 128" in kvmix("eval", "--plan", "named+mikv").stderr

    def test_a_plan_with_a_plus_in_its_name_is_that_plan(self, counting):
        save_plan("a+mikv", uniform(4))
        save_plan("a", uniform(8))
        assert bits(kvmix_json("eval", *TINY, "--plan", "a+mikv")["rows"])["a+mikv"][0] == 4
        assert bits(kvmix_json("eval", *TINY, "--plan", "a+mikv+h2o")["rows"])["a+mikv+h2o"][0] == 1

    def test_widths_that_others_state_have_no_axes(self, counting):
        """`uniform-2` beside a plan with tiers has its pages and groups, not its tiers."""
        save_plan("tiered", Plan.uniform(tiny().info, 2, 2, preset.find_preset("mikv").cache))
        options = ("--plan", "tiered", "--plan", "0-7:k4v4", "--uniform", 2, "--baseline", "uniform-8")
        rows = bits(kvmix_json("eval", *TINY, *options)["rows"])
        assert (rows["0-7:k4v4"], rows["uniform-2"], rows["uniform-8"]) == ((4, 5), (2, 3), (8, 9))

    def test_a_random_plan_spends_what_a_plan_with_tiers_does(self, counting):
        options = ("--plan", "0-3:k4v4,4-7:k2v2+mikv", "--baseline", "random-plan")
        rows = bits(kvmix_json("eval", *TINY, *options)["rows"])
        assert rows["random-plan"] == rows["0-3:k4v4,4-7:k2v2+mikv"]

    def test_kvtuners_presets(self, counting):
        Path("tuned.yaml").write_text("".join(f"{i}: {{nbits_key: 8, nbits_value: 4}}\n" for i in range(8)))
        rows = bits(
            kvmix_json("eval", *TINY, "--preset", "kvtuner:tuned.yaml", "--preset", "kvtuner:tuned.yaml+h2o")["rows"]
        )
        assert rows["kvtuner:tuned"][0] == 6
        assert rows["kvtuner:tuned+h2o"][0] == 1.5

    def test_the_newest_plan_says_which_model(self, counting):
        save_plan("newest", uniform(4))
        result = kvmix("eval", "--preset", "kivi-2", "--json")
        assert "newest.yaml" in result.stderr
        assert '"newest"' not in result.stdout

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--preset", "mikw"), "unknown preset 'mikw' (did you mean 'mikv'?)"),
            (("--preset", "qqq"), "known are adakv, asymkv, balancekv, block-gtq, bumblebee, cam, chunkkv, cocktail,"),
            (("--preset", "mikv+qqq"), "unknown preset 'qqq'"),
            (("--preset", "mikv+"), "unknown preset ''"),
            (("--preset", "mikv+h2o"), "preset 'h2o' cannot be put on 'mikv': both sort tokens"),
            (
                ("--preset", "mikv+rotate-2+zipcache"),
                "'zipcache' cannot be put on 'mikv' with 'rotate-2': both sort tokens",
            ),
            (("--preset", "kitty+mixkvq"), "both sort channels"),
            (("--preset", "rotate-2+rotate-2"), "both rotate keys"),
            (("--preset", "mikv+kivi-4"), "'kivi-4' cannot be put on 'mikv': it has no transforms, tokens or channels"),
            (("--preset", "mikv", "--preset", "mikv"), "two rows would be called 'mikv'"),
            (("--preset", "kvtuner:none.yaml"), "none.yaml: cannot be read"),
            (("--plan", "0-7:k2v2+mikw"), "unknown preset 'mikw' (did you mean 'mikv'?)"),
            (("--plan", "missing+mikv"), "no plan"),
            (("--plan", "missing.yaml+mikv"), "missing.yaml does not exist"),
            (("--plan", "mikv"), "for the preset: --preset mikv"),
        ],
    )
    def test_bad_input_is_one_line(self, options, said):
        assert said in refused(kvmix("eval", *TINY, *options))

    def test_a_leaderboard_has_no_presets(self):
        result = kvmix("eval", "--leaderboard", "--preset", "mikv")
        assert result.exit_code == 2
        assert "--preset has no place in a leaderboard" in result.stderr

    def test_a_preset_does_not_name_a_model(self):
        assert "no plan" in refused(kvmix("eval", "--preset", "mikv"))


class TestMeasured:
    """Through the cache itself."""

    @pytest.mark.slow
    def test_what_presets_take_is_what_was_predicted(self, monkeypatch):
        """At their own widths; studies/test_systems.py asks the same of the others at 3 bits, and leaves four out."""
        save_small(Path("small"), layers=4)
        small = load_model("small", device="cpu")
        monkeypatch.setattr("kvmix_cli.models.loading.load_model", lambda model, **options: small)
        save_with_moments(profile_path("small"), small.info)
        # All others run in studies/test_systems.py, scaled to another size.
        names = (
            "kivi-2",
            "transform-2",
            "minikv",
            "quest",
            "shadowkv",
            "tokenselect",
            "mikv+rotate-2",
            "zipcache+mixkvq",
        )
        options = ("--model", "small", "--task", "memory", "--length", 700, "--limit", 1)
        rows = kvmix_json("eval", *options, *(part for name in names for part in ("--preset", name)))["rows"][1:]
        errors = {row["plan"]: row["metrics"]["prediction_error_percent"]["value"] for row in rows}
        assert errors == pytest.approx(dict.fromkeys(names, 0), abs=0.05), (
            "but for the decoded token's statistics, one for each exact token, too"
        )

    @pytest.mark.slow
    def test_a_policy_that_only_evicts_is_not_told_that_it_quantizes_nothing(self):
        result = kvmix("eval", *TINY, "--task", "memory", "--length", 300, "--limit", 1, "--preset", "h2o")
        assert result.exit_code == 0
        assert "NOTHING QUANTIZED" not in result.stderr

    @pytest.mark.slow
    def test_a_run(self):
        options = ("run", *TINY, "--prompt", PROMPT, "--max-new-tokens", 3)
        result = kvmix_json(*options, "--preset", "mikv+rotate-2")
        assert result["plan"] == "mikv+rotate-2"
        assert result["quantized_share"] > 0
        full = kvmix_json(*options, "--baseline")
        assert result["cache_bytes"] < full["cache_bytes"]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--plan", "0-7:k2v2"), "choose one of --plan and --preset, or put them together: --plan PLAN+PRESET"),
            (("--baseline",), "choose one of --preset and --baseline"),
            (("--uniform", 2), "choose one of --preset and --uniform"),
        ],
    )
    def test_one_cache_at_a_time(self, options, said):
        result = kvmix("run", *TINY, "--prompt", "x", "--preset", "mikv", *options)
        assert result.exit_code == 2
        assert said in result.stderr


class TestSolved:
    """The preset whose widths come from a profile's moments."""

    @pytest.mark.slow
    def test_it_is_the_plan_that_allocate_makes(self, counting):
        save_with_moments(TINY_PROFILE, tiny().info)
        said = kvmix("eval", *TINY, "--preset", "transform-2", "--json").stderr
        assert "using profile profiles/builtin--tiny/profile.yaml" in said
        assert not list(Path("profiles").glob("**/plans/*.yaml")), "a preset leaves no plan"
        made = kvmix_json("allocate", "--preset", "transform-2", "--model", "builtin:tiny")
        assert (made["method"], Path(made["plan"]).name) == ("transform", "transform-2.yaml")
        rows = bits(kvmix_json("eval", *TINY, "--preset", "transform-2")["rows"])
        assert rows["transform-2"] == (made["bits"]["nominal"], made["bits"]["stored"])
        plan = Plan.load(Path(made["plan"]))
        assert 1.98 < plan.bits.nominal <= 2
        folders = [path.name for path in Path("results").glob("counting__*__transform-2__*")]
        kvmix_json("eval", *TINY, "--plan", "transform-2")
        assert [path.name for path in Path("results").glob("counting__*__transform-2__*")] == folders, "the same plan"

    @pytest.mark.slow
    def test_a_run_and_inspect(self):
        save_with_moments(TINY_PROFILE, tiny().info)
        result = kvmix_json("run", *TINY, "--preset", "transform-2", "--prompt", PROMPT, "--max-new-tokens", 2)
        assert result["quantized_share"] > 0
        assert kvmix_json("inspect", "transform-2", "--model", "builtin:tiny")["provenance"]["method"] == "transform"
        shown = kvmix("inspect", "transform-2", "--model", "builtin:tiny").stdout
        assert re.search(r"^loss:    .* nats a token, .* % perplexity, as fisher-metric predicts$", shown, re.MULTILINE)

    @pytest.mark.parametrize("has_profile", [False, True])
    def test_without_moments_it_says_what_to_run(self, has_profile):
        if has_profile:
            falling(8).save(TINY_PROFILE)
        said = "preset 'transform-2' needs the directions of builtin:tiny, which no profile has: run "
        said += "`kvmix profile builtin:tiny --score fisher-metric`"
        for command in (("eval",), ("run", "--prompt", "x")):
            assert refused(kvmix(*command, *TINY, "--preset", "transform-2")) == said
        assert refused(kvmix("inspect", "transform-2", "--model", "builtin:tiny")) == said

    def test_a_profile_of_another_model_is_refused(self):
        save_with_moments(TINY_PROFILE, make_info(4, model_id="builtin:tiny"))
        said = refused(kvmix("eval", *TINY, "--preset", "transform-2"))
        assert "the plan was made for another builtin:tiny than this one: layers 4 against 8" in said
        assert not list(Path("profiles").glob("**/basis-*")), "nothing is written"

    def test_nothing_is_put_on_it(self):
        save_with_moments(TINY_PROFILE, tiny().info)
        said = refused(kvmix("eval", *TINY, "--preset", "transform-2+mikv"))
        assert "the plan's transform codes do not combine with transforms, tokens or channels" in said


class TestAllocate:
    @pytest.fixture(autouse=True)
    def profiled(self):
        falling(32).save(Path("profiles") / "org--model" / "profile.yaml")

    def test_the_plan_has_what_the_preset_does(self):
        result = kvmix_json("allocate", "--avg-bits", 2.3, "--with", "mikv", "--with", "rotate-2")
        assert result["plan"] == "profiles/org--model/plans/rank-2.3+mikv+rotate-2.yaml"
        plan = Plan.load(Path(result["plan"]))
        assert plan.short == "0-5:k3v2,6-25:k2v2,26-31:k2v4"
        assert plan.provenance["with"] == ["mikv", "rotate-2"]
        assert list(plan.cache.axes) == ["transforms", "tokens"]
        assert plan.cache.page == 32
        assert plan.bits.nominal == pytest.approx(0.2 * 8 + 0.8 * 2.28125)

    def test_it_says_what_the_budget_is_of(self):
        result = kvmix("allocate", "--avg-bits", 2.3, "--with", "mikv")
        assert "the budget is of the layers' own bits; the table counts mikv, too" in result.stderr
        assert "pages of 32 tokens, as mikv needs, instead of 128" in result.stderr
        assert "nominal 3.425" in result.stdout
        assert "tokens:  by attention: 20 % at k8v8, 80 % at the layer's bits; 160 at a time" in result.stdout

    def test_a_budget_of_bytes_counts_tiers(self):
        memory = 300 * 2**20
        options = ("--memory", memory, "--context", 32768, "--with", "mikv", "--with", "mixkvq")
        with_tiers = kvmix_json("allocate", *options)
        assert with_tiers["bytes"]["cache"] <= memory
        assert with_tiers["bytes"]["cache"] > 0.95 * memory

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--with", "mikw"), "unknown preset 'mikw' (did you mean 'mikv'?)"),
            (("--with", "kivi-2"), "preset 'kivi-2' cannot be put on this plan: it has no transforms"),
            (
                ("--with", "mikv", "--with", "h2o"),
                "preset 'h2o' cannot be put on this plan with 'mikv': both sort tokens",
            ),
            (("--with", "mikv", "--page", 64), "mikv cannot go with pages of 64 tokens; leave out --page"),
        ],
    )
    def test_what_does_not_go_together(self, options, said):
        assert said in refused(kvmix("allocate", "--avg-bits", 2.3, *options))
        assert not Path("profiles/org--model/plans").exists()

    @pytest.mark.slow
    def test_inspect_says_what_a_plan_does(self):
        for preset_name in ("kitty", "zipcache"):
            kvmix("allocate", "--avg-bits", 2.3, "--with", preset_name, "-q")
        shown = kvmix("inspect", "rank-2.3+zipcache").stdout
        assert "stored:  values balanced" in shown
        assert "tokens:  by normalised: 60 % at k4v4, 40 % at the layer's bits; 160 at a time" in shown
        shown = kvmix("inspect", "rank-2.3+kitty").stdout
        said = "of keys, by magnitude: 12.5 % at 4 bits, the rest at the layer's; sorted anew every 128 tokens"
        assert f"runs:    {said}" in shown
        result = kvmix_json("inspect", "rank-2.3+zipcache", "rank-2.3+kitty")
        assert result["settings"]["cache.channels"] == ["none", said]
        assert result["settings"]["cache.transforms"] == ["values balanced", "none"]
        result = kvmix_json("inspect", "rank-2.3+kitty")
        assert result["cache"]["channels"]["runs"] == [{"share": 0.125, "bits": 4}]

    def test_inspect_shows_a_preset_for_a_model(self):
        result = kvmix("inspect", "mikv", "--model", "builtin:tiny")
        assert "plan for builtin:tiny by preset" in result.stdout
        assert "stored:  keys balanced" in result.stdout
        path = preset.presets()["kitty"]
        assert kvmix_json("inspect", path, "--model", "builtin:tiny")["bits"]["nominal"] == 2.25
        assert "is a preset, which does not name its model: add --model ID" in refused(kvmix("inspect", "mikv"))
        assert "no plan in" in refused(kvmix("inspect", "mikw", "--model", "org/model"))

    def test_other_engines_do_not_know_them(self):
        kvmix("allocate", "--avg-bits", 8, "--k-bits", "8", "--v-bits", "8", "--with", "rotate-2", "--name", "x", "-q")
        said = refused(kvmix("export", "x", "--to", "vllm"))
        assert said.startswith("vllm cannot express this plan: it knows widths, but not transforms of the plan's cache")


@pytest.mark.slow
def test_run_reads_a_prompt_twice_and_keeps_it(tmp_path):
    given = ("--preset", "kvzip", "--prompt", PROMPT, "--max-new-tokens", "3")
    first = kvmix_json("run", *TINY, *given, "--save-cache", str(tmp_path / "cache.safetensors"))
    second = kvmix_json("run", *TINY, *given, "--load-cache", str(tmp_path / "cache.safetensors"))
    assert first["text"] == second["text"]
    assert first["quantized_share"] > 0
    assert first["cache_bytes"] == second["cache_bytes"]
    assert "leave out --prefill-chunk" in refused(kvmix("run", *TINY, *given, "--prefill-chunk", "100"))
