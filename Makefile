# make demo    install, then train stock backprop, fused backprop and cDNI and print the verdict
# make test    install, then linters, type checker and the whole test suite
# make lint    the static checks alone
# make bench   pytest-benchmark suites, grouped by question, floors beside
# make tables  measure interleaved (minutes, an otherwise idle machine), then rewrite the tables
# make answers measure what docs/verdict.md says (about an hour, idle; MNIST=DIR), then write it
# make clean   remove what was built; make distclean removes the environment too
#
# PYTHON=...    interpreter that the environment is made from (3.10 or newer)
# PIP_ARGS=...  more options for pip, for example the index of CPU-only torch wheels
# MNIST=...     folder of the four MNIST files, for make answers
# JOBS=...      processes that run tests, a file each (one a core); 0 for this one alone

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

.PHONY: install demo test lint bench tables answers clean distclean FORCE

install: $(INSTALLED)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "fused_dni needs Python 3.10 or newer with venv and ensurepip" \
			"(Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; fi
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)

# An extension that somebody deleted (git clean) is built again, stamp or no stamp.
ifeq ($(wildcard fused_dni/_cpu*.so),)
$(INSTALLED): FORCE
endif
$(INSTALLED): $(BUILD_INPUTS) | $(BIN)/python
	@echo "Installing fused_dni and what it is tested with (the first time takes minutes) ..."
	@export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	$(BIN)/python -m pip install -qq -c constraints.txt --upgrade pip $(PIP_ARGS) && \
	$(BIN)/python -m pip install -qq -c constraints.txt --build-constraint constraints.txt \
		$(PIP_ARGS) -e ".[test]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/fused-dni demo $(DEMO_ARGS)

lint: $(INSTALLED)
	@echo "ruff check";  $(BIN)/ruff check .
	@echo "ruff format"; $(BIN)/ruff format --check .
	@echo "mypy";        $(BIN)/mypy
	@echo "clang-format"; $(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# C++ is compiled with warnings as errors by the installation itself.
test: lint
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		$(TEST_ARGS)

bench: $(INSTALLED)
	@$(BIN)/python -m pytest bench --benchmark-only $(BENCH_ARGS)

tables: $(INSTALLED)
	@$(BIN)/python bench/tables.py measure
	@$(BIN)/python bench/tables.py render

answers: $(INSTALLED)
	@$(BIN)/python bench/answers.py measure --data $(MNIST)
	@$(BIN)/python bench/tables.py render

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks runs
	rm -f fused_dni/*.so $(INSTALLED)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
