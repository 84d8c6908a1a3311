# Every target makes what it needs, also as the first command on a fresh machine.
PYTHON ?= python3
PYTEST_ARGS ?=
CASES ?= 1000000
SEED ?= $(shell date +%s)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# What the API reference shows; the rest is nobody's interface.
API := ddpm_fast $(addprefix ddpm_fast.,ops schedules samplers script_utils training.trainer training.recipe training.checkpoint training.data training.images evaluation.metrics evaluation.classifier)

.PHONY: help demo test check lint sanitize fuzz docs bench aot gpu clean
.DELETE_ON_ERROR:

help: ## show this list (default)
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: $(READY) ## train on real digits and draw samples into demo/
	$(PY) -m ddpm_fast demo --out demo

test: $(READY) ## run the test suite, a process a core
	$(PY) -m pytest -n auto $(PYTEST_ARGS)

check: lint test ## lint, format, types and tests: what CI runs

lint: $(READY) ## lint, format and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(READY) ## write the API reference, from the docstrings, into build/api/
	$(PY) -W error -m pdoc -d google -o build/api $(API)

# The package with its sanitized module is found first from build/sanitize/. The sanitizers must be loaded before Python,
# and libstdc++ with them. Python itself leaks, so leaks aren't looked for. Reports go past pytest, which can't show them.
PRELOAD = $(foreach name,libasan libubsan libstdc++,$(shell $${CXX:-g++} -print-file-name=$(name).so))
SANITIZED = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DDPM_FAST_SANITIZE=1 LD_PRELOAD="$(PRELOAD)"
sanitize: $(READY) ## run the ops' tests on a native module that stops at bad addresses and overflows (gcc)
	DDPM_FAST_NATIVE=1 DDPM_FAST_SANITIZE=1 $(PY) setup.py -q build --build-lib build/sanitize
	cd build/sanitize && $(SANITIZED) $(abspath $(PY)) -m pytest -n auto --capture=sys -o pythonpath= -p no:cacheprovider \
		-k "not reference- and not triton" --ignore=$(CURDIR)/tests/ops/test_triton.py --ignore=$(CURDIR)/tests/ops/test_cuda.py \
		$(CURDIR)/tests/test_native.py $(CURDIR)/tests/ops $(PYTEST_ARGS)

fuzz: $(READY) ## call every public function with CASES=1000000 right and wrong arguments; SEED=... repeats a run
	@echo "SEED=$(SEED) CASES=$(CASES)"
	DDPM_FAST_FUZZ=$(CASES) $(PY) -m pytest tests/fuzz -v --hypothesis-seed=$(SEED) $(PYTEST_ARGS)

bench: $(READY) ## measure sampling, training and ops against plain PyTorch
	$(PY) benchmarks/sample_throughput.py --quick
	$(PY) benchmarks/train_throughput.py --quick
	$(PY) -m benchmarks.ops --quick

aot: $(READY) ## compile every Triton kernel, and with nvcc every CUDA kernel, for GPUs that need not be here; reports are kept
	$(PY) -m benchmarks.aot --json benchmarks/results/aot.json
	$(PY) -m benchmarks.nvcc --json benchmarks/results/nvcc.json

# Without .venv: it measures the PyTorch, and so the CUDA, that this machine has. PART=tests, tune, ops, sample, train or
# profile. A run stops after 7.5 minutes, all its parts together, and the same command goes on from there.
PART ?= all
OUT ?= benchmarks/results/gpu
gpu: ## check and measure on this machine's GPU, with its own PyTorch; PART=... for one part
	@$(PYTHON) -c "import torch" 2>/dev/null || { echo "$(PYTHON) can't import torch; name one that can: make gpu PYTHON=..."; exit 1; }
	$(PYTHON) benchmarks/gpu_suite.py --part $(PART) --out $(OUT)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .*_cache .benchmarks
	rm -f ddpm_fast/_C*.so ddpm_fast/_cuda*.so ddpm_fast/_*_unavailable.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, by its pinned version: as another package's dependency the newest would come.
$(READY): pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" || { echo "$(PYTHON) can't make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) and compiling the kernels; this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch setuptools pybind11 cmake ninja
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@if [ -f ddpm_fast/_C_unavailable.txt ]; then echo "No native module: $$(cat ddpm_fast/_C_unavailable.txt)"; fi
	@if [ -f ddpm_fast/_cuda_unavailable.txt ]; then echo "No CUDA kernels: $$(cat ddpm_fast/_cuda_unavailable.txt)"; fi
	@touch $@
