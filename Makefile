# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
RECORDS ?= 200000

.DEFAULT_GOAL := help
.PHONY: help install run test unit lint types format chaos bench bench-quick bench-report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv and install Headrace with the servers that it can embed

run: $(INSTALLED) ## start everything, load a sample and serve (FILE=path, ONCE=1, RECORDS=n)
	@exec $(BIN)/python -m api.cli up --records $(RECORDS) $${FILE:+--file "$$FILE"} $(if $(filter-out 0 no false,$(ONCE)),--once)

test: lint types ## lint, types, and every test, on real servers
	@$(BIN)/python -m pytest -q -n 3 --dist worksteal

unit: $(TESTABLE) ## the tests that need no server
	@$(BIN)/python -m pytest -q tests/unit

lint: $(TESTABLE) ## ruff
	@$(BIN)/python -m ruff check engine api bench tests && $(BIN)/python -m ruff format --check engine api bench tests

types: $(TESTABLE) ## mypy --strict
	@$(BIN)/python -m mypy --strict engine api bench

format: $(TESTABLE) ## format the code with ruff
	@$(BIN)/python -m ruff format engine api bench tests

chaos: $(TESTABLE) ## loads broken on purpose, for about an hour (NAMES="kills steps", SHORT=1)
	@$(BIN)/python -m tests.chaos $(NAMES) $(if $(filter-out 0 no false,$(SHORT)),--short)

bench: $(TESTABLE) ## the benchmarks, on real servers (ARGS="--benchmark-json=out.json -k write")
	@$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-only --timeout=1800 $(ARGS)

bench-quick: $(TESTABLE) ## small benchmarks: under two minutes
	@$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-only --quick --benchmark-max-time=0.2 --benchmark-min-rounds=3 $(ARGS)

bench-report: $(TESTABLE) ## measure everything against the ceiling and write bench/REPORT.md (GIGABYTES=10, QUICK=1)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m bench.report $(if $(GIGABYTES),--gigabytes $(GIGABYTES)) $(if $(filter-out 0 no false,$(QUICK)),--quick)

clean: ## remove .venv and what tools leave behind; the data in .headrace stays
	rm -rf .venv* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f engine/text/_bson.*.so

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "headrace: Python 3.11 or newer is not on the PATH: sudo apt-get install python3 python3-venv, or python3.11 python3.11-venv where that is older" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "headrace: $(PYTHON) has no venv module: sudo apt-get install python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BIN)/python pyproject.toml constraints.txt $(wildcard engine/text/*.c)
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "headrace: $(VENV) has no pip, or a Python older than 3.11: run make clean, then the same again" >&2; exit 1; }
	@echo "Installing into $(VENV) ..."
	@rm -f engine/text/_bson$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[local]'
	@$(BIN)/python -c 'import engine.text._bson' 2>/dev/null || echo "No C compiler, or no header of Python: loads will take more CPU (apt-get install gcc python3-dev, then make clean and again)"
	@touch $@

$(TESTABLE): $(INSTALLED)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[local,dev]'
	@touch $@
