# The one entry point. Every target sets up what it needs; see `make help`.

PYTHON  ?= python3
BACKEND ?= cpu
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.stamp
# The features and profile are the same for every target, so that each crate is compiled once.
CARGO_TEST := cargo test --release --features gpu
RUST    := $(shell find src python/src shaders -type f 2>/dev/null) Cargo.toml Cargo.lock python/Cargo.toml pyproject.toml

.PHONY: help demo test test-full test-rust test-python test-valgrind test-debug mutants coverage coverage-rust lint format wheel sdist docs clean build
.PHONY: bench bench-full bench-rules bench-check bench-record-counts bench-import

help:  ## list the chores
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "roptim needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(STAMP)-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'maturin>=1.9,<2' 'numpy>=1.26' 'pytest>=8' 'hypothesis>=6.100' 'ml_dtypes>=0.4' 'safetensors>=0.4' 'scipy>=1.11' 'mpmath>=1.3'
	@touch $@

$(STAMP)-lint: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'ruff>=0.6' 'mypy>=1.11'
	@touch $@

$(STAMP)-coverage: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'coverage>=7.10'
	@touch $@

$(STAMP)-examples: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'scikit-learn>=1.4' 'matplotlib>=3.8' 'tqdm>=4.66'
	@touch $@

$(STAMP)-build: $(STAMP)-test $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --quiet
	@touch $@

build: $(STAMP)-build  ## compile the extension into the environment

demo: $(STAMP)-build $(STAMP)-examples  ## train on handwritten digits, resume, plot (BACKEND=gpu for the GPU)
	$(BIN)/python examples/digits.py --backend $(BACKEND)

test: test-rust test-python  ## run both test suites

test-full: export ROPTIM_FULL_TESTS = 1
test-full: test-rust test-valgrind test-debug $(STAMP)-build $(STAMP)-examples  ## the same with the long forms of soaks, power cuts and hostile files, and under valgrind
	$(BIN)/python -m pytest

# Every test of the CPU but power cuts, which touch no array. Valgrind runs one thread at a time, knows no AVX-512 (the
# engine takes AVX2 there by itself), and no thread that flushes small numbers to zero.
WATCHED := $(filter-out gpu gpu_closure house power_cuts safety shaders,$(basename $(notdir $(wildcard tests/*.rs))))
VALGRIND := "valgrind", "--quiet", "--error-exitcode=77", "--leak-check=no"
test-valgrind: export ROPTIM_FULL_TESTS = 0
test-valgrind: export ROPTIM_BRIEF_TESTS = 1
test-valgrind:  ## run the Rust tests under valgrind, where it is installed
	@if command -v valgrind >/dev/null; then set -x; \
	$(CARGO_TEST) --config 'target."cfg(all())".runner = [$(VALGRIND)]' --lib $(addprefix --test ,$(WATCHED)) \
		-- --test-threads=1 --skip gpu --skip device --skip flushes; \
	else echo "test-valgrind is left out: valgrind is not on the PATH (Debian's package: valgrind)"; fi

# The dev profile has the standard library's checks of what unsafe code owes, and overflow checks.
test-debug: export ROPTIM_FULL_TESTS = 0
test-debug: export ROPTIM_BRIEF_TESTS = 1
test-debug:  ## run the Rust tests of the CPU with debug assertions
	cargo test --lib $(addprefix --test ,$(WATCHED))

mutants:  ## change the engine in small ways and see whether tests notice (needs cargo-mutants; SHARD=0/15 for a part)
	ROPTIM_BRIEF_TESTS=1 cargo mutants --timeout 300 $(if $(SHARD),--shard $(SHARD) --sharding round-robin) -o build

coverage: $(STAMP)-build $(STAMP)-examples $(STAMP)-coverage  ## lines of the Python package that its tests run
	rm -rf build/coverage && mkdir -p build/coverage
	# Left out: tests that count system calls, and processes that may write nowhere. Both are the tool's own needs.
	COVERAGE_FILE=$(abspath build/coverage/data) $(BIN)/python -m coverage run -m pytest \
		--ignore tests/python/test_kills.py -k 'not closed_to'
	COVERAGE_FILE=$(abspath build/coverage/data) $(BIN)/python -m coverage combine --quiet
	COVERAGE_FILE=$(abspath build/coverage/data) $(BIN)/python -m coverage report

# LLVM of the compiler's version (`rustc -vV`) reads what it counted: Debian's package `llvm-22`.
LLVM ?= /usr/lib/llvm-22/bin
COUNTED := build/coverage-rust
coverage-rust: export ROPTIM_FULL_TESTS = 0
coverage-rust: export ROPTIM_BRIEF_TESTS = 1
coverage-rust: export RUSTFLAGS = -C instrument-coverage
coverage-rust: export LLVM_PROFILE_FILE = $(abspath $(COUNTED))/%m-%p.profraw
coverage-rust: export CARGO_TARGET_DIR = target/coverage
coverage-rust:  ## lines of the engine that the Rust tests of the CPU run (needs LLVM)
	rm -rf $(COUNTED) && mkdir -p $(COUNTED)
	cargo test --no-run --lib $(addprefix --test ,$(WATCHED) power_cuts) 2>&1 | tee $(COUNTED)/build
	cargo test --lib $(addprefix --test ,$(WATCHED) power_cuts)
	$(LLVM)/llvm-profdata merge --sparse $(COUNTED)/*.profraw -o $(COUNTED)/all
	$(LLVM)/llvm-cov report --instr-profile $(COUNTED)/all --show-region-summary=false --show-branch-summary=false \
		$$(sed -n 's/.*Executable.*(\(.*\))/--object \1/p' $(COUNTED)/build) --sources src

test-rust:
	$(CARGO_TEST)

test-python: $(STAMP)-build $(STAMP)-examples
	$(BIN)/python -m pytest

lint: $(STAMP)-build $(STAMP)-lint  ## rustfmt, clippy, ruff, mypy, stubtest
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --features gpu -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest roptim._roptim

format: $(STAMP)-lint  ## format everything
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)-build $(STAMP)-examples  ## compare with torch, NumPy, optax and a C loop on small cases, as far as installed
	$(BIN)/python benches/compare.py --quick

bench-full: $(STAMP)-build $(STAMP)-examples  ## the same with large cases and long rounds, up to half an hour
	$(BIN)/python benches/compare.py

bench-rules:  ## time each optimizer's kernels with each instruction set, one thread
	cargo bench --bench rules

bench-check: $(STAMP)-build  ## compare the instructions of a small step with the record (needs valgrind)
	$(BIN)/python benches/fixed_cost.py --check

bench-record-counts: $(STAMP)-build  ## record the instructions of a small step
	$(BIN)/python benches/fixed_cost.py --write

bench-import: $(STAMP)-build  ## time `import roptim`; sizes of extension module and wheel
	$(BIN)/python benches/imports.py

wheel: $(STAMP)-test  ## build the wheel into dist/
	$(BIN)/maturin build --release --out dist

sdist: $(STAMP)-test  ## build the source distribution and install it into an environment of its own
	$(BIN)/maturin sdist --out dist
	rm -rf $(VENV)-sdist && $(PYTHON) -m venv $(VENV)-sdist
	CARGO_TARGET_DIR=$(abspath target) $(VENV)-sdist/bin/python -m pip install --quiet dist/roptim-*.tar.gz
	cd $(VENV)-sdist && bin/python -c 'import numpy, roptim; roptim.AdamW([numpy.ones(3)]).step([numpy.ones(3)])'
	test "$$($(VENV)-sdist/bin/python -m pip list --format=freeze | grep -vcE '^(pip|setuptools|numpy|roptim)=')" = 0

docs:  ## build the engine's documentation
	cargo doc --no-deps --features gpu

clean:  ## remove everything that was built
	rm -rf target dist build demo-output benches/output $(VENV) $(VENV)-sdist
