# Every target sets itself up in .venv, so `make serve` works on a bare clone.
#
#   make serve           serve the embedded demo model (or: make serve MODEL=/path/to/checkpoint)
#   make test            the tests of a change: all but the long proofs
#   make test-slow       the long proofs; CI runs both
#   make test-cpus       of these, what tells kinds of CPUs apart: generic, AVX2, AVX-512, and this machine's own
#   make test-oldest     the GPU kernels' tests in Triton's interpreter, under the oldest torch and triton that are allowed
#   make check           lint, format check, types, tests: what CI runs first
#   make fix             repair what ruff can repair
#   make docs            build the documentation's site into site/
#   make bench           serve the demo model and measure it with `moe-serve bench serve`
#   make clean           remove .venv, builds and tool caches
#
# PYTHON=...       interpreter that .venv is made from (3.11 or newer)
# TORCH_INDEX=...  extra package index to take torch from. PyPI's Linux build brings CUDA along (gigabytes);
#                  PyTorch's own index of CPU builds does not: see README.md.

PYTHON ?= python3
TORCH_INDEX ?=
MODEL ?=
SERVE_ARGS ?=
TEST_WORKERS ?= 3
SLOW_WORKERS ?= 2
BENCH_PORT ?= 8765
BENCH_ARGS ?= --num-prompts 64 --request-rate 8 --random-input-len 128 --random-output-len 64 --ignore-eos

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP := $(wildcard kernels/moe_serve_kernels/cpu/native/*/*.[chi]*)

.DELETE_ON_ERROR:
.PHONY: serve test test-slow test-cpus test-oldest check lint types fix docs bench clean

serve: $(READY)
	$(BIN)/moe-serve serve $(MODEL) $(SERVE_ARGS)

# OMP_WAIT_POLICY: idle OpenMP threads must sleep, not spin, or small machines test at half speed.
# TEST_WORKERS, SLOW_WORKERS: files are dealt out to N processes; 0 runs everything in one. Quick tests often wait for
# a server, so 3 fill 2 cores; slow ones take the memory of whole models.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -n $(TEST_WORKERS) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -n $(SLOW_WORKERS) --durations 25 -m slow

test-cpus: $(READY)
	$(PYTEST) -n $(SLOW_WORKERS) $(foreach kind,engine families kernels,tests/$(kind)/test_instruction_sets.py) \
		tests/families/test_batch_invariance.py

# In an environment of its own. PyPI's torch 2.11 needs CUDA 13's libraries, several GB, also on a machine without a GPU.
# Triton 3.6's interpreter makes scalars of arrays with one entry: an error since numpy 2.4, a warning before.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(OLDEST)/bin/python -m pytest -q -n $(SLOW_WORKERS) \
		-W 'ignore:Conversion of an array with ndim:DeprecationWarning' -p no:cacheprovider tests/kernels/gpu $(OLDEST_ARGS)

$(OLDEST)/.ready: constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -v '^\(torch\|triton\|numpy\|nvidia\|cuda\)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt torch==2.11.0 triton==3.6.0 'numpy<2.4' transformers gguf \
		msgspec xxhash llguidance jinja2 scipy tqdm prometheus-client pytest pytest-xdist pytest-timeout hypothesis
	touch $@

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

types: $(READY)
	$(BIN)/mypy --strict

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# BENCH_PORT is not serve's port, so a running server is neither measured nor disturbed by accident.
bench: $(READY)
	@$(BIN)/moe-serve serve $(MODEL) --port $(BENCH_PORT) $(SERVE_ARGS) & server=$$!; \
	trap 'kill $$server 2>/dev/null; wait $$server' EXIT; \
	$(BIN)/moe-serve bench serve --base-url http://127.0.0.1:$(BENCH_PORT) --ready-check-timeout-sec 600 $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone, so that TORCH_INDEX is asked for nothing else; where that index cannot
# be reached, pip says so and takes the build it finds elsewhere.
$(READY): pyproject.toml constraints.txt setup.py $(CPP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'moe-serve needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --no-deps --retries 1 -c constraints.txt \
	    --extra-index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@
