# `make quickstart` needs nothing but Python 3.11+; every target makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

# processes that share the tests, a file each
WORKERS ?= 2
# the counterparts of `make contract`
PARTS ?= vllm,litellm,llamacpp
# what `make bench` runs, each one also alone as `make bench-steps`; `make bench-gpu` needs a GPU
BENCHES = loss steps timeline quickstart_time
# flags of one of them, as --shape 512,256,16384; without any, the figures are written to docs/results/bench/
BENCH ?=
# a folder of earlier figures to print ratios to
COMPARE ?=
# the commit beside which `make bench-quickstart_time` runs this tree
BEFORE ?= 66afc18

.PHONY: install quickstart test contract lint fix docs demo-models results bench $(BENCHES:%=bench-%) bench-gpu browser

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install  ## distil the shipped student from the shipped text-only teacher
	$(BIN)/python examples/quickstart.py

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

contract: install  ## adapters against real servers, each in an environment made under .contract/
	OMNIOPD_CONTRACT='$(PARTS)' $(BIN)/python -m pytest tests/contract

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m omniopd.catalogue --check

docs: install  ## docs/methods/ from the code
	$(BIN)/python -m omniopd.catalogue

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo-models: install  ## build the demo models again from their seed
	$(BIN)/python examples/demo/build.py

results: install  ## the tables under docs/results/ (hours on two cores; finished runs are kept)
	$(BIN)/python examples/results.py

bench: $(if $(BENCH),bench-loss,$(BENCHES:%=bench-%))  ## every benchmark; with BENCH="flags" that of the losses (16 GB, an hour)
	$(BIN)/python examples/bench/page.py

$(BENCHES:%=bench-%) bench-gpu: bench-%: $(VENV)/.bench
	$(BIN)/python examples/bench/$*.py $(FLAGS) $(or $(BENCH),--json docs/results/bench/$*.json) $(EARLIER)

EARLIER = $(addprefix --compare ,$(wildcard $(COMPARE)/$*.json))
bench-quickstart_time: FLAGS = --before $(BEFORE)

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@
