# make demo    set up and run the main job: train, compare and generate on real text
# make test    set up and run the tests
# make lint    formatting, lint and types
# make bench   set up and run the benchmarks, peers included
# make clean   remove everything these made
PYTHON ?= python3
VENV := .venv
TEST_WORKERS ?= 2
BIN := $(VENV)/bin
# Python compiles what it imports: a small part of torch, transformers and the rest.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -q install --no-compile
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export LMFAST_REQUIRE_EXT ?= 1
export PIP_NO_WARN_SCRIPT_LOCATION = 1

.PHONY: demo test lint bench clean install

# triton comes with CUDA builds of torch, in the version they need; beside a CPU build it is only
# used to interpret and to compile kernels for a GPU that is elsewhere.
$(VENV)/.deps: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch numpy setuptools cmake ninja pybind11
	$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) "triton==3.6.*" || true
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	$(INSTALL) --no-build-isolation -c constraints.txt -e ".[test,plot]"
	touch $@

$(VENV)/.lint: $(VENV)/.deps
	$(INSTALL) -c constraints.txt ruff clang-format mypy
	touch $@

install: $(VENV)/.built

demo: install
	$(BIN)/python -m lmfast demo

test: install
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

lint: install $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

bench: install
	$(INSTALL) -c constraints.txt tokenizers tiktoken gigatoken transformers
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

clean:
	rm -rf $(VENV) build dist lmfast.egg-info .benchmarks .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f lmfast/*.so lmfast/_build_report.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
