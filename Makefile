# Every check of this project by name. `.ci/run` calls these same recipes in environments that it makes.
.PHONY: help setup test slow clients check lint format types rooms docs docs-check fuzz bench wheel

help: ## list the recipes
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## install relexio from this folder with what the tests need, and the hooks of git
	pip install -e ".[test]" pre-commit
	pre-commit install

test: ## the README's test command; one test: pytest -n0 tests/test_loops.py -k read
	pytest

slow: ## slow tests, and those against torch and transformers: pip install -e ".[test,hf,rlvr]"
	pytest -m "(slow or hf) and not clients"

clients: ## programs that use predictions and trajectories, really run: pip install -e ".[test,hf,clients]"
	pytest -m clients

check: lint types rooms docs-check ## all that needs no test run

lint: ## style and format
	ruff check .
	ruff format --check .

format: ## mend style and format where that can be done without a person
	ruff check --fix .
	ruff format .

types: ## types, strict in relexio, checked in tests and tools
	mypy

rooms: ## which room may import which
	lint-imports

docs: ## write docs/cli.md from the commands' own help
	python tools/cli_docs.py

docs-check: ## is docs/cli.md what would be written?
	python tools/cli_docs.py --check

fuzz: ## every fuzz target for two seconds, fixed seed
	timeout 240 python tools/attack/fuzz.py all --seconds 2

bench: ## the benchmark on two small models: numbers are printed, never judged
	python tools/bench/bench.py --quick

wheel: ## build the wheel, and run it in an environment of its own, away from this folder
	pip install -q build
	set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	python -m build -q --wheel --outdir "$$away" . ; \
	python -m venv "$$away/venv"; cd "$$away"; venv/bin/pip install -q relexio-*.whl; \
	venv/bin/python -c "import relexio.loops; print('compiled loops', relexio.loops.COMPILED)"; \
	venv/bin/python -c "from importlib.resources import files; files('relexio.loops').joinpath('loops.cu').read_text()"; \
	venv/bin/relexio demo -o demo; \
	venv/bin/relexio backtest demo/run.zarr --window 5:50; \
	venv/bin/relexio inspect demo/run.zarr --json > inspect.json; \
	venv/bin/python -c "import json; print('skill', json.load(open('inspect.json'))['skill'])"
