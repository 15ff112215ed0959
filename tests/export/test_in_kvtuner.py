"""Presets in KVTuner's own code, where a checkout of it is named; its presets, read and written again.

    git clone https://github.com/cmd2001/KVTuner
    pip install --no-deps --target older transformers==4.51.3 tokenizers==0.21.4 huggingface-hub==0.36.0
    KVTUNER=KVTuner KVTUNER_SITE=older pytest tests/export/test_in_kvtuner.py

KVTuner does not know transformers 5, so its cache runs in a process of its own, with the older one in front.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from kvmix_kernels.layout import PageLayout
from kvmix_kernels.quantize import naive

from kvmix_cli.export import TARGETS
from kvmix_cli.plan import CacheSettings, ModelInfo, Plan

KVTUNER, SITE = (os.environ.get(name) for name in ("KVTUNER", "KVTUNER_SITE"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (KVTUNER and SITE), reason="KVTUNER and KVTUNER_SITE name no KVTuner"),
]
INFO = ModelInfo(id="org/model", layers=4, kv_heads=2, head_dim=64)
SHORT = "0:k8v8,1:k4v2,2:k3v4,3:k2v3"
SHAPE = (2, 1, 2, 128, 64)
READ = f"""
import json, sys, torch
from flexible_quant.flexible_quantized_cache import FlexibleQuantizedCacheConfig, FlexibleVanillaQuantizedCache
config = FlexibleQuantizedCacheConfig(
    backend="vanilla", nbits=-1, nbits_key=-1, nbits_value=-1, asym=True, axis_key=1, axis_value=0, q_group_size=64,
    residual_length=64, compute_dtype=torch.float32, per_layer_quant=True, per_layer_config_path=sys.argv[1],
)
cache, draw = FlexibleVanillaQuantizedCache(config), torch.Generator().manual_seed(0)
errors = []
for layer in range({INFO.layers}):
    given = torch.randn({SHAPE}, generator=draw)
    cache.update(*given, layer)
    read = torch.stack(cache.update(*torch.zeros_like(given[..., :1, :]), layer))[..., :-1, :]
    errors.append((read - given).square().mean((1, 2, 3, 4)).sqrt().tolist())
print(json.dumps(errors))
"""


def test_its_cache_reads_a_preset_and_loses_what_ours_does(tmp_path):
    plan = Plan.from_short(SHORT, INFO, CacheSettings(page=64, group_size=64))
    preset = tmp_path / "preset.yaml"
    preset.write_text(TARGETS["kvtuner"].export(plan, None).text)
    paths = os.pathsep.join([SITE, str(Path(KVTUNER, "flexible_quant"))])
    command = [sys.executable, "-c", READ, str(preset)]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    draw = torch.Generator().manual_seed(0)
    for (layer, bits), errors in zip(plan.layers.items(), json.loads(found.stdout), strict=True):
        given = torch.randn(SHAPE, generator=draw)
        for kind, tensor, states, error in zip(("key", "value"), (bits.k, bits.v), given, errors, strict=True):
            layout = PageLayout(kind, tensor.bits, 64, 64, 64)
            codes = naive.quantize(states.unflatten(2, (2, 64)), layout)
            own = (naive.dequantize(*codes, layout).flatten(2, 3) - states).square().mean().sqrt().item()
            assert error == pytest.approx(own, rel=0.03), f"layer {layer} {kind}: its zero point is a whole step"


def test_its_presets_are_read_and_written_again():
    paths = sorted(Path(KVTUNER).glob("calibration_presets*/*.yaml"))
    assert len(paths) > 40
    for path in paths:
        layers = yaml.safe_load(path.read_text())
        plan = Plan.from_kvtuner(path, ModelInfo(id="org/model", layers=len(layers), kv_heads=8, head_dim=128))
        assert yaml.safe_load(TARGETS["kvtuner"].export(plan, None).text) == layers, path.name
