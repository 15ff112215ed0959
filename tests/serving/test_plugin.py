"""The plugin without vLLM: a stand-in of the few names that it uses."""

import dataclasses
import errno
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from architectures import build
from coding import coded_plan
from evaluating import tiny

from kvmix_cli import serving
from kvmix_cli.cache.blocks import bytes_per_token
from kvmix_cli.errors import KvmixError, PlanError
from kvmix_cli.export import TARGETS
from kvmix_cli.export.plugin import with_measured_loss
from kvmix_cli.plan import Plan
from kvmix_cli.plan.windows import NoWindow
from kvmix_cli.serving import checks, contract, plugin

TOKENS_OF_A_BLOCK = 128


@dataclasses.dataclass
class Spec:
    num_kv_heads: int = 2
    head_size: int = 64
    dtype: object = None
    state_content_bytes: int | None = None


@dataclasses.dataclass
class Step:
    query_start_loc_cpu: object = None
    seq_lens: object = None
    max_seq_len: int = 0
    num_reqs: int = 0
    block_table_tensor: object = None
    slot_mapping: object = None
    causal: object = True


def configuration(**changes):
    """What vLLM's configuration has, as far as it is looked at."""
    facts = {"tensor": 1, "pipeline": 1, "dtype": "auto", "block": TOKENS_OF_A_BLOCK, "speculative": None, **changes}
    parallel = SimpleNamespace(tensor_parallel_size=facts["tensor"], pipeline_parallel_size=facts["pipeline"])
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=facts.get("config", tiny().config), model="tiny"),
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype=facts["dtype"], block_size=facts["block"]),
        speculative_config=facts["speculative"],
    )


class Attention:
    """Records the backend that each layer was given."""

    backends: ClassVar[dict] = {}

    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, cache_config=None, prefix="", attn_backend=None):
        self.backends[prefix] = attn_backend


class Implementation:
    def __init__(self, *args, **kwargs):
        self.alibi_slopes, self.sliding_window, self.sinks = kwargs.get("alibi"), kwargs.get("window", -1), None
        self.scale, self.logits_soft_cap = 0.125, 0

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        raise AssertionError("the plugin has its own")


class Builder:
    def __init__(self, kv_cache_spec=None):
        self.kv_cache_spec = kv_cache_spec

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        raise AssertionError("the plugin has its own")


class Backend:
    @classmethod
    def customize_spec(cls, spec):
        return spec

    @classmethod
    def supported_kv_cache_layouts(cls):
        raise AssertionError("the plugin has its own")

    @staticmethod
    def get_impl_cls():
        return Implementation

    @staticmethod
    def get_builder_cls():
        return Builder


class EngineArgs:
    config = None

    def create_engine_config(self, usage_context=None):
        return self.config


def platform(device):
    """What vLLM says of the device that it runs on."""
    return SimpleNamespace(is_cpu=lambda: device == "cpu", device_type=device)


def modules(version, registered):
    """The stand-in, by module name."""
    return {
        "vllm": {"__version__": version},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: 0,
            "get_tensor_model_parallel_world_size": lambda: 1,
        },
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": type("EngineArgs", (EngineArgs,), dict(vars(EngineArgs)))},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {},
        "vllm.model_executor.layers.attention.attention": {
            "Attention": type("Attention", (Attention,), {**vars(Attention), "backends": {}})
        },
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"extract_layer_index": lambda layer_name: int(layer_name.split(".")[2])},
        "vllm.platforms": {"current_platform": platform("cpu")},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionBackend": Backend,
            "AttentionCGSupport": SimpleNamespace(NEVER="never"),
            "AttentionMetadataBuilder": Builder,
            "CommonAttentionMetadata": Step,
            "MultipleOf": lambda base: base,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackend": Backend,
            "CPUAttentionBackendImpl": Implementation,
            "CPUAttentionMetadataBuilder": Builder,
        },
        "vllm.v1.attention.backends.triton_attn": {
            "TritonAttentionBackend": type("OnGPU", (Backend,), {}),
            "TritonAttentionImpl": type("AttentionOnGPU", (Implementation,), {}),
            "TritonAttentionMetadataBuilder": Builder,
        },
        "vllm.v1.attention.backends.registry": {
            "register_backend": lambda backend, class_path: registered.update({backend: class_path})
        },
        "vllm.v1.kv_cache_interface": {"AttentionSpec": Spec, "KVCacheLayout": SimpleNamespace(LBHNC="by head")},
    }


@pytest.fixture
def engine(monkeypatch):
    """A function that puts a stand-in of a version of vLLM in place; its modules and what is registered with it."""

    def put(version="0.32.0"):
        registered = {}
        found = {name: ModuleType(name) for name in modules(version, registered)}
        for name, content in modules(version, registered).items():
            vars(found[name]).update(content, __path__=[])
            monkeypatch.setitem(sys.modules, name, found[name])
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(found[parent], last, found[name])
        monkeypatch.delitem(sys.modules, "kvmix_cli.serving.backend", raising=False)
        plugin.install.cache_clear()
        return SimpleNamespace(
            registered=registered,
            args=found["vllm.engine.arg_utils"].EngineArgs,
            attention=found["vllm.model_executor.layers.attention.attention"].Attention,
            modules=found,
        )

    yield put
    sys.modules.pop("kvmix_cli.serving.backend", None)
    plugin.install.cache_clear()


@pytest.fixture
def plan_file(tmp_path, monkeypatch):
    """A plan for the built-in model with layers of three sizes, named by the environment."""
    path = Plan.from_short("0-3:k4v4,4-6:k2v2,7:k16v4", tiny().info).save(tmp_path / "plan.yaml")
    monkeypatch.setenv(serving.VARIABLE, str(path))
    return path


def created(engine, **changes):
    engine.args.config = configuration(**changes)
    return engine.args().create_engine_config()


def test_without_a_plan_nothing_is_touched(engine, monkeypatch):
    monkeypatch.delenv(serving.VARIABLE, raising=False)
    found = engine("9.9")
    before = found.attention.__init__, found.args.create_engine_config
    serving.register()
    assert (found.attention.__init__, found.args.create_engine_config) == before


def test_layers_get_a_backend_by_their_size(engine, plan_file):
    found = engine()
    serving.register()
    serving.register()  # vLLM may call it again
    for index in range(8):
        found.attention(4, 64, 0.125, num_kv_heads=2, prefix=f"model.layers.{index}.attn")
    backends = found.attention.backends
    assert len(set(backends.values())) == len(found.registered) == 3
    plan = Plan.load(plan_file)
    for name, backend in backends.items():
        index = int(name.split(".")[2])
        spec = backend.customize_spec(Spec())
        size = bytes_per_token(plan, index, 128, torch.get_default_dtype())
        assert (str(spec.dtype), spec.state_content_bytes) == ("torch.uint8", size)
        assert found.registered[backend.get_name()] == f"kvmix_cli.serving.backend.{backend.__name__}"
        assert getattr(sys.modules["kvmix_cli.serving.backend"], backend.__name__) is backend


def test_room_for_a_sink_is_that_of_the_engines_blocks(engine, tmp_path, monkeypatch):
    model = build("llama")
    coded = coded_plan(model, tmp_path, exact=0)
    cache = coded.cache.model_copy(update={"sink": 1, "window": NoWindow()})
    path = Plan.build(coded.model, coded.layers, cache).save(tmp_path / "plan.yaml")
    monkeypatch.setenv(serving.VARIABLE, str(path))
    found, sizes = engine(), {}
    serving.register()
    for block in (32, 64, None):
        config = SimpleNamespace(block_size=block)
        found.attention(4, 16, 0.25, num_kv_heads=2, cache_config=config, prefix="model.layers.0.attn")
        backend = found.attention.backends["model.layers.0.attn"]
        sizes[block] = backend.customize_spec(Spec()).state_content_bytes
    plan, dtype = Plan.load(path), torch.get_default_dtype()
    assert sizes == {block: bytes_per_token(plan, 0, block or 32, dtype) for block in sizes}
    assert sizes[64] < sizes[32] == sizes[None]


def test_a_backend_that_a_model_asks_for_stays(engine, plan_file):
    found = engine()
    serving.register()
    found.attention(4, 64, 0.125, prefix="model.layers.0.attn", attn_backend="its own")
    found.attention(4, 64, 0.125, prefix="model.layers.8.attn")
    assert found.attention.backends == {"model.layers.0.attn": "its own", "model.layers.8.attn": None}


def test_what_is_held_otherwise_is_said_in_one_line(engine, plan_file, caplog):
    found = engine()
    serving.register()
    assert created(found) is found.args.config
    (record,) = caplog.records
    assert record.getMessage().startswith("kvmix: the engine stores every token by itself: keys of 7 layers in groups")
    assert "\n" not in record.getMessage()


def test_codes_that_were_made_for_a_window_are_refused_until_their_loss_is_measured(
    engine, tmp_path, monkeypatch, caplog
):
    model = build("llama")
    codes = coded_plan(model, tmp_path).model_copy(update={"provenance": {"metric_window": "recent:128"}})
    path = codes.save(tmp_path / "plan.yaml")
    monkeypatch.setenv(serving.VARIABLE, str(path))
    found = engine()
    serving.register()
    with pytest.raises(PlanError, match=r"\(recent:128\), and an engine codes every token: profile .* --window none"):
        created(found, config=model.config, block=16)
    made = with_measured_loss(TARGETS["vllm-plugin"].export(Plan.load(path)), "builtin", 766, 0.5, 0.001)
    path.write_text(made.text)
    found = engine()
    serving.register()
    assert created(found, config=model.config, block=16) is found.args.config
    (record,) = caplog.records
    assert record.getMessage() == (
        "kvmix: the engine stores every token of the plan by itself: it diverges by 0.5 nats a token there, and by "
        "0.001 in kvmix's own cache, measured on 766 tokens of builtin"
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tensor": 4}, "has 2 KV heads, which 4 ranks do not divide"),
        ({"pipeline": 2}, "cannot have --pipeline-parallel-size; start it without"),
        ({"dtype": "fp8"}, "cannot have --kv-cache-dtype"),
        ({"speculative": "some"}, "cannot have --speculative-config"),
        ({"block": 24}, "blocks of 24 tokens are no multiple of 16"),
    ],
)
def test_configurations_that_cannot_hold_a_plan_are_refused(changes, match, engine, plan_file):
    found = engine()
    serving.register()
    with pytest.raises(PlanError, match=match) as error:
        created(found, **changes)
    assert "\n" not in str(error.value)


def test_a_plan_for_another_model_is_refused(engine, plan_file):
    found = engine()
    serving.register()
    config = tiny().config.__class__(**{**tiny().config.to_dict(), "num_hidden_layers": 7})
    with pytest.raises(PlanError, match=r"the plan was made for .*layers 8 against 7"):
        created(found, config=config)


def test_devices_without_kernels_are_refused(engine, plan_file):
    found = engine()
    serving.register()
    found.modules["vllm.platforms"].current_platform = platform("tpu")
    with pytest.raises(
        KvmixError, match="vLLM runs on tpu, and kvmix holds plans in its engines for cpu and cuda only"
    ):
        created(found)


def test_a_gpu_is_said_to_be_untried_and_extends_vllms_backend_for_it(engine, plan_file, caplog):
    found = engine()
    serving.register()
    found.modules["vllm.platforms"].current_platform = platform("cuda")
    assert created(found) is found.args.config
    difference, untried = [record.getMessage() for record in caplog.records]
    assert difference.startswith("kvmix: the engine stores every token by itself")
    assert untried.startswith("kvmix: plans in an engine have never run on a GPU")
    found.attention(4, 64, 0.125, num_kv_heads=2, prefix="model.layers.0.attn")
    backend = found.attention.backends["model.layers.0.attn"]
    of_vllm = found.modules["vllm.v1.attention.backends.triton_attn"]
    assert issubclass(backend, of_vllm.TritonAttentionBackend)
    assert issubclass(backend.get_impl_cls(), of_vllm.TritonAttentionImpl)
    assert backend.get_impl_cls()(window=(-1, -1)).plan == Plan.load(plan_file)
    assert backend.supported_kv_cache_layouts() == ("by head",)
    assert backend.get_builder_cls()._cudagraph_support == "never"


def test_what_has_no_gpu_kernel_is_refused_on_a_gpu(engine, plan_file, tmp_path):
    found = engine()
    serving.register()
    found.modules["vllm.platforms"].current_platform = platform("cuda")
    with pytest.raises(
        PlanError, match="blocks of 16 tokens have no GPU kernel; start the engine with --block-size 64"
    ):
        created(found, block=16)
    model = build("llama")
    for v, match in (
        (16, "layers 0, 1, 2, 3 have transform codes of keys or values alone, which have no GPU kernel"),
        ("coded", "frames of 64 positions have no GPU kernel; profile with the default ones, multiples of 128"),
    ):
        with pytest.raises(PlanError, match=match):
            checks._check_kernels(coded_plan(model, tmp_path, v=v, exact=0), 64)


def test_transform_codes_are_taken_on_a_gpu(engine, tmp_path, monkeypatch):
    model = build("llama")
    coded = coded_plan(model, tmp_path, exact=0, frame=128)
    plan = Plan.build(coded.model, coded.layers, coded.cache.model_copy(update={"sink": 1, "window": NoWindow()}))
    monkeypatch.setenv(serving.VARIABLE, str(plan.save(tmp_path / "coded.yaml")))
    found = engine()
    serving.register()
    found.modules["vllm.platforms"].current_platform = platform("cuda")
    created(found, config=model.config, block=64)
    found.attention(4, 64, 0.125, num_kv_heads=2, prefix="model.layers.0.attn")
    assert found.attention.backends["model.layers.0.attn"].get_impl_cls()(window=(-1, -1)).plan == plan


def test_a_name_that_a_devices_engine_lacks_is_named(engine, plan_file):
    found = engine()
    serving.register()
    del found.modules["vllm.v1.attention.backends.cpu_attn"].CPUAttentionMetadataBuilder
    missing = "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder"
    with pytest.raises(KvmixError, match=f"this vLLM lacks {missing}"):
        created(found)


def test_a_step_is_of_the_blocks_that_its_longest_sequence_has(engine, plan_file):
    engine()
    from kvmix_cli.serving.backend import PlanMetadataBuilder

    step = Step(
        query_start_loc_cpu=torch.tensor([0, 3, 4, 4], dtype=torch.int32),
        seq_lens=torch.tensor([3, 200, 0], dtype=torch.int32),
        max_seq_len=200,
        num_reqs=2,
        block_table_tensor=torch.arange(24, dtype=torch.int32).view(3, 8),
        slot_mapping=torch.arange(8),
        causal=True,
    )
    batch = PlanMetadataBuilder(SimpleNamespace(block_size=64)).build(0, step)
    assert batch.table.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert batch.positions.tolist() == [0, 1, 2, 199]
    with pytest.raises(PlanError, match="attends causally; this model does not"):
        PlanMetadataBuilder().build(0, dataclasses.replace(step, causal=False))


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3", "dev", "0.321.0"])
def test_versions_that_were_not_tested_are_refused(version, engine, plan_file):
    engine(version)
    with pytest.raises(
        KvmixError, match=rf"vLLM {version} cannot hold a plan: kvmix has been tested with vLLM 0\.32\.\*"
    ):
        serving.register()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "v0.32.5.dev3"])
def test_versions_that_were_tested(version):
    contract.check_version(version)


def test_a_name_that_is_gone_is_named(engine, plan_file, monkeypatch):
    found = engine()
    del found.modules["vllm.v1.attention.backend"].MultipleOf
    monkeypatch.setattr(found.attention, "__init__", lambda self, head_size, num_kv_heads, prefix: None)
    missing = "cache_config, attn_backend of vllm.model_executor.layers.attention.attention.Attention.__init__"
    assert contract.missing_hooks() == [missing, "vllm.v1.attention.backend.MultipleOf"]
    with pytest.raises(KvmixError, match=f"vLLM 0.32.0 lacks {missing}"):
        serving.register()


def test_a_plan_that_cannot_be_read_is_refused(engine, tmp_path, monkeypatch):
    engine()
    monkeypatch.setenv(serving.VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(KvmixError, match=r"none\.yaml"):
        serving.register()


def test_models_with_windows_or_slopes_are_refused(engine, plan_file):
    engine()
    from kvmix_cli.serving.backend import PlanAttention

    for options in ({"alibi": [1.0]}, {"window": 128}):
        with pytest.raises(PlanError, match="neither ALiBi nor sliding windows"):
            PlanAttention(**options)


@pytest.mark.parametrize("program", ["/usr/bin/vllm", "/site/vllm/entrypoints/openai/api_server.py"])
def test_programs_of_vllm_write_one_line(program, engine, plan_file, monkeypatch, capsys):
    engine("0.1.0")
    monkeypatch.setattr(sys, "argv", [program, "serve"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(KvmixError) as error:
        serving.register()
    sys.excepthook(KvmixError, error.value, None)
    sys.excepthook(OSError, OSError(errno.EADDRINUSE, "Address already in use"), None)
    refused, in_use = capsys.readouterr().err.splitlines()
    assert refused.startswith("kvmix: vLLM 0.1.0 cannot hold a plan")
    assert in_use == "kvmix: the server's port is in use: choose another with --port, or stop what listens there"
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err
