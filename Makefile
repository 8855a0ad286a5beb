# `make quickstart` needs nothing but Python 3.11+; every target makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

# the counterparts of `make contract`
PARTS ?= vllm,litellm,llamacpp
# flags of `make bench`, as --shape 512,256,16384 or --device cuda --dtype bfloat16
BENCH ?= --json docs/results/bench/loss.json

.PHONY: install quickstart test contract lint fix demo-models results bench browser

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install  ## distil the shipped student from the shipped text-only teacher
	$(BIN)/python examples/quickstart.py

test: install
	$(BIN)/python -m pytest

contract: install  ## adapters against real servers, each in an environment made under .contract/
	OMNIOPD_CONTRACT='$(PARTS)' $(BIN)/python -m pytest tests/contract

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo-models: install  ## build the demo models again from their seed
	$(BIN)/python examples/demo/build.py

results: install  ## the tables under docs/results/ (hours on two cores; finished runs are kept)
	$(BIN)/python examples/results.py

bench: install  ## memory and time of the losses beside dense, TRL's and Liger's (16 GB and up to an hour on two cores)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python examples/bench/loss.py $(BENCH)
	$(BIN)/python examples/bench/page.py
