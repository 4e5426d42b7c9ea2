# Every target makes what it needs in .venv on a fresh machine, then runs. Needed beforehand: a C compiler,
# GNU make and Python 3.11 or later with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALLED := $(VENV)/.stamp
CORE := codec/CMakeLists.txt $(wildcard codec/csrc/* codec/include/*)
MODEL ?=
ARGS ?=
SECONDS ?= 60
SEED ?= 1
VERSION ?=

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-transformers sanitize fuzz fuzz-guided bench lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with everything for development, and build the C core

demo: $(INSTALLED) ## train, pack, verify, load and run a small model (MODEL=PATH: your own checkpoint)
	$(BIN)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: $(INSTALLED) ## run the tests (ARGS="-k name" for some of them)
	$(BIN)/python -m pytest $(ARGS)

test-transformers: $(INSTALLED) ## run the loader's tests with another transformers (VERSION=5.17.0)
	@test -n "$(VERSION)" || { echo "make test-transformers VERSION=5.17.0" >&2; exit 2; }
	@mkdir -p build
	@grep -E '^(numpy|safetensors|tqdm)==' constraints-dev.txt > build/constraints-transformers.txt
	@test -d build/transformers-$(VERSION) || $(PIP) install --target build/transformers-$(VERSION) \
		-c build/constraints-transformers.txt transformers==$(VERSION)
	PYTHONPATH=build/transformers-$(VERSION) $(BIN)/python -m pytest tests/test_transformers.py \
		tests/test_fused.py tests/test_torch.py tests/test_expert_cache.py $(ARGS)

bench: $(INSTALLED) ## print the size of the format against other codes
	$(BIN)/python benchmarks/format_rate.py $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## lay the code out as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: build/sanitize/.stamp ## run the tests that are not slow against a C core built with sanitizers
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
		QMOE_LIBRARY="$(CURDIR)/build/sanitize/libqmoe.so" $(BIN)/python -m pytest -m "not slow" $(ARGS)

fuzz: build/sanitize/.stamp ## fuzz every reader for SECONDS=60 each, the same way for the same SEED=1
	$(BIN)/python -m pytest -q tests/test_fuzz.py -k corpus
	$(CC) -std=c11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
		-o build/sanitize/fuzz_reference spec/reference/fuzz_reference.c
	build/sanitize/fuzz_reference $(SECONDS) $(SEED) $(wildcard spec/vectors/*/*.qmx?)
	build/sanitize/fuzz_core $(SECONDS) $(SEED) $(wildcard spec/vectors/*/*.qmxd spec/vectors/*/*.qmxm)
	build/sanitize/fuzz_model $(SECONDS) $(SEED) spec/vectors/valid/dictionary-trees-10.qmxd
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q tests/test_fuzz.py -k python
	if command -v clang >/dev/null; then $(MAKE) fuzz-guided; else echo "no clang: not guided by coverage" >&2; fi

fuzz-guided: $(VENV)/.tools ## fuzz with clang's libFuzzer, from the committed corpus on
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S codec -B build/guided \
		-DCMAKE_C_COMPILER=clang -DQMOE_LIBFUZZER=ON >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/guided --target fuzz_core_guided fuzz_model_guided
	clang -DQMOE_LIBFUZZER -O1 -g -fsanitize=fuzzer,address,undefined \
		-o build/guided/fuzz_reference spec/reference/fuzz_reference.c
	mkdir -p build/guided/core build/guided/model build/guided/reference
	build/guided/fuzz_core_guided -max_total_time=$(SECONDS) -seed=$(SEED) build/guided/core codec/fuzz/corpus
	build/guided/fuzz_model_guided -max_total_time=$(SECONDS) -seed=$(SEED) build/guided/model
	build/guided/fuzz_reference -max_total_time=$(SECONDS) -seed=$(SEED) -close_fd_mask=3 \
		build/guided/reference spec/reference/corpus

clean: ## remove .venv and all build outputs
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.tools: constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "installing into $(VENV)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$$(grep '^torch==' constraints-dev.txt)"
	@$(PIP) install -c constraints-dev.txt scikit-build-core cmake ninja
	@touch $@

$(INSTALLED): $(VENV)/.tools pyproject.toml constraints-dev.txt $(CORE)
	@echo "building and installing qmoe-format" >&2
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -c constraints-dev.txt \
		--config-settings cmake.define.QMOE_WERROR=ON --editable '.[dev]'
	@touch $@

build/sanitize/.stamp: $(INSTALLED) $(wildcard codec/fuzz/*)
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S codec -B build/sanitize \
		-DCMAKE_C_COMPILER=$(CC) -DQMOE_SANITIZE=address,undefined -DQMOE_WERROR=ON >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize
	@touch $@
