# Two commands: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PASTKEY := $(BIN)/pastkey
PYTEST_ARGS ?=
# `make test SLOW=1` runs the slow tests too, as CI does. WORKERS processes share the tests.
SLOW ?=
WORKERS ?= 2
BENCH_ARGS ?=

.PHONY: demo test check figures bench clean

# From nothing to text: train on the built-in stories, export to fp32 and int8, prove it, tell a story.
demo: $(VENV)/installed
	$(PASTKEY) train --out demo/checkpoint --force
	$(PASTKEY) export demo/checkpoint --out demo/fp32 --precision fp32 --force
	$(PASTKEY) export demo/checkpoint --out demo/int8 --force
	$(BIN)/python -m benchmarks.stories demo/fp32 demo/int8
	$(BIN)/python examples/tell_story.py demo/int8

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(if $(SLOW),,-m "not slow") $(PYTEST_ARGS)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The figures of the README, measured again on this machine. Needs the bundles of `make demo`.
figures: $(VENV)/installed
	$(BIN)/python -m benchmarks.figures demo

# pastkey beside other engines on this machine, each installed in an environment of its own: benchmarks/results.md.
# `make bench BENCH_ARGS=--full` measures more engines and how pastkey scales. The same command goes on after a stop.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

# pip 25.1 is the first that knows dependency groups.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	touch $@

clean:
	rm -rf demo build dist *.egg-info
