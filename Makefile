# `make demo` needs nothing but Python 3.11 and make; every target is quick when nothing has changed.
SHELL := /bin/bash
PYTHON ?= python3
export PYTHON
.DEFAULT_GOAL := install
.PHONY: install demo test coverage check format bench lock upgrade samples clean

RUNTIME := .venv/.runtime
DEV := .venv/.dev

install: $(DEV)

$(RUNTIME): requirements-build.lock requirements.lock pyproject.toml scripts/install
	@scripts/install runtime

$(DEV): requirements-dev.lock requirements-model.lock $(RUNTIME)
	@scripts/install dev

demo: $(RUNTIME)
	@.venv/bin/mogine demo

test: $(DEV)
	@scripts/test

coverage: $(DEV)
	@scripts/test --cov --cov-report=term

check: $(DEV)
	@scripts/check

format: $(DEV)
	@.venv/bin/ruff format --quiet && .venv/bin/ruff check --fix --quiet

bench: $(DEV)
	@scripts/bench

lock: $(DEV)
	@scripts/lock

upgrade: $(DEV)
	@scripts/lock --upgrade

samples: $(DEV)
	@.venv/bin/python scripts/make-samples

clean:
	rm -rf .venv build dist .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
