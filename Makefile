# Words for people; `make help` lists them. The work is done by scripts/bootstrap.py, CMakePresets.json and pyproject.toml.

PYTHON ?= python3
ROUNDS ?= 2000
JOBS ?= 2
FUZZ_SECONDS ?= 60
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
NATIVE_FILES = $(shell find csrc tests/core tests/fake_cuda -name '*.h' -o -name '*.cpp')
# ThreadSanitizer of GCC 12 cannot place its shadow where newer kernels randomise addresses widely.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)
# Plugins by name: those that happen to be installed beside the starting interpreter's torch stay out.
PLAIN_PYTEST := PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$(PY)" -m pytest -p pytest_timeout
PYTEST := $(PLAIN_PYTEST) -p _hypothesis_pytestplugin
OUT ?= benchmarks/results

export PATH := $(VENV)/bin:$(PATH)
export ASAN_OPTIONS ?= detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS ?= print_stacktrace=1
export TSAN_OPTIONS ?= halt_on_error=1:second_deadlock_stack=1

.PHONY: help build build-gpu test test-core test-python test-faults fuzz model matrix test-gpu bench-gpu bench bench-full bench-tools bench-ranks limits report instructions instructions-record soak demo asan tsan lint format types docs clean
.DEFAULT_GOAL := help

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Each word first sets up what it needs, in .venv and build/ inside the checkout. $(PYTHON) is the starting"
	@echo "point (make PYTHON=...): if it has torch >= 2.4, that torch is used, also that of an active virtual"
	@echo "environment, which itself stays untouched; otherwise torch is installed into .venv."
	@echo "WHEELS=folder takes packages from a folder alone, without a network (CONTRIBUTING.md)."

build: ## make .venv, build the extension, install the checkout in editable mode
	$(call set-up,dev)

build-gpu: ## the same with the few packages that test-gpu and bench-gpu need
	$(call set-up,gpu)

test: test-core test-python ## all tests: C++ core, then Python

test-core: build ## the tests of the C++ core
	$(call core-tests,dev,core)

test-python: build ## the tests of the Python package (ARGS="-k name" picks some)
	@$(PYTEST) tests/python tests/faults tests/fuzz $(ARGS)

test-faults: build ## the fault tests at length (ROUNDS=2000, JOBS=2 at a time), and their table in docs/reliability.md
	@FAULT_ROUNDS=$(ROUNDS) FAULT_TABLE=docs/reliability.md $(PYTEST) --timeout=0 -o faulthandler_timeout=0 \
		-p xdist.plugin -n $(JOBS) --dist load --maxschedchunk 1 tests/faults $(ARGS)
	@tests/model/check.sh

fuzz: build ## mutants for every decoder of bytes from elsewhere, C++ under sanitizers (FUZZ_SECONDS=60 each)
	$(call core-tests,asan,asan,FUZZ_SECONDS=$(FUZZ_SECONDS),fuzz)
	@"$(PY)" -W ignore tests/fuzz/fuzz_decoders.py --seconds $(FUZZ_SECONDS) --runs 100

model: ## search every run of the ring's protocol, with spin (a minute)
	@tests/model/check.sh

test-gpu: build-gpu ## the tests that need an NVIDIA GPU (ARGS="-k name" picks some)
	@$(PLAIN_PYTEST) tests/gpu $(ARGS)

bench-gpu: build-gpu ## what recording costs on a GPU, into OUT=benchmarks/results (ARGS=--help)
	@"$(PY)" -m benchmarks.gpu --out "$(OUT)" $(ARGS)

bench: build ## what recording costs on this machine's CPU and disk (minutes), into OUT=benchmarks/results
	@"$(PY)" -m benchmarks.cpu --out "$(OUT)" $(ARGS)

bench-tools: build ## install into .venv what bench compares with, and matplotlib (optional: what is missing is skipped)
	@cd scripts && "$(PY)" -c "import development_environment as d; d.pip_install(*d.requirements('benchmark'), *d.requirements('baselines'))"

bench-full: build ## the same with more rounds, sizes and calls (an hour)
	@"$(PY)" -m benchmarks.cpu --full --out "$(OUT)" $(ARGS)

bench-ranks: build ## what 1,024 simulated ranks cost a reader, and 1 to 8 ranks each other (minutes)
	@"$(PY)" -m benchmarks.ranks.simulation
	@"$(PY)" -m benchmarks.ranks.scaling

limits: build ## what copying, writing, LMDB, sending and unlink cost without us, on tmpfs and on the disk of the checkout (minutes)
	@"$(PY)" benchmarks/limits/run.py

report: build ## the README's table and its plot, from OUT=benchmarks/results
	@"$(PY)" -m benchmarks.report --results "$(OUT)" $(ARGS)

instructions: build ## count instructions of hook path and writer, fail if they have grown (needs valgrind)
	@$(PLAIN_PYTEST) -s tests/instructions $(ARGS)

instructions-record: build ## make what is counted now the recorded counts of this environment
	@"$(PY)" -m benchmarks.instructions --record

demo: build ## train, record, export and read back a small classifier
	@"$(PY)" examples/digits.py

asan: build ## the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call core-tests,asan,asan)

tsan: build ## the core's tests under ThreadSanitizer
	$(call core-tests,tsan,tsan,$(FIXED_ADDRESSES))

lint: build ## ruff and clang-format, changing nothing
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@clang-format --dry-run -Werror $(NATIVE_FILES)

format: build ## let ruff and clang-format rewrite the sources
	@"$(PY)" -m ruff check --fix-only --quiet .
	@"$(PY)" -m ruff format .
	@clang-format -i $(NATIVE_FILES)

types: build ## mypy --strict on the package, and the extension against its stub
	@"$(PY)" -m mypy
	@MYPYPATH=python "$(PY)" -m mypy.stubtest ml_debugger._core --mypy-config-file pyproject.toml --allowlist tests/stubtest_allowlist.txt

soak: build ## the long runs: memory over 10^5 calls and GB of trace, cut uploads, 8 ranks, two hosts (minutes)
	@$(PYTEST) -m soak -o faulthandler_timeout=0 tests/python $(ARGS)

matrix: build ## every cell of the matrix of models; writes the tables of docs/model_support.md (half an hour)
	@$(PYTEST) -o timeout=900 -o faulthandler_timeout=0 tests/python/test_model_matrix.py --matrix write $(ARGS)

docs: build ## the API reference as HTML, in build/docs
	@"$(PY)" -m pdoc --docformat google --output-directory build/docs ml_debugger
	@printf "%s\n" build/docs/index.html

clean: ## remove build/ and caches (.venv stays: rm -rf .venv)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# $(1) what for: dev or gpu.
define set-up
	@command -v "$(PYTHON)" >/dev/null || { echo "[setup] $(PYTHON) was not found: install Python 3.10 or newer, or name it, as in \`make PYTHON=python3.11 test\`." >&2; exit 1; }
	@"$(PYTHON)" -B scripts/bootstrap.py --for $(1)
endef

# $(1) preset, $(2) its folder in build/, $(3) prefix of the command, $(4) filter. The closing line says how many passed.
define core-tests
	@cmake --preset $(1) -DPython_EXECUTABLE="$(PY)" >build/$(2).log 2>&1 || { cat build/$(2).log; exit 1; }
	@cmake --build --preset $(1) >build/$(2).log 2>&1 || { cat build/$(2).log; exit 1; }
	@echo "core tests ($(1)):"
	@$(3) build/$(2)/tests/core/core_tests $(if $(4),$(4),$(FILTER))
endef
