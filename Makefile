# Two commands: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
# The newest Python that CI runs: Debian 13's own is 3.13.
NEWEST_PYTHON ?= /usr/bin/python3
# Those that `make matrix` runs the runtime's tests on: each that is here of 3.11 to 3.14.
PYTHONS ?= $(shell for version in 11 12 13 14; do found=$$(command -v python3.$$version) && \
	$$found -c "import venv, ensurepip" 2>/dev/null && echo $$found; done)
VENV := .venv
BIN := $(VENV)/bin
PASTKEY := $(BIN)/pastkey
ENVIRONMENTS := .environments
OLDEST := tests/constraints-oldest.txt
PYTEST_ARGS ?=
# `make test SLOW=1` runs the slow tests too, as CI does, and `make test MATRIX=1` all there are. WORKERS processes share
# the tests.
SLOW ?=
MATRIX ?=
CHOSEN = $(if $(MATRIX),,$(if $(SLOW),not matrix,not slow))
WORKERS ?= 2
KILLS ?= 1000
SOAK_MINUTES ?= 30
BENCH_ARGS ?=
DOCS := .venv-docs
# `make quick` runs every test file but these, which train, export, or run many sessions: a new one is quick until it
# stands here.
NOT_QUICK := $(wildcard $(patsubst %,tests/%/*.py,export/graft export/source export/compat fuzz programs)) \
	$(patsubst %,tests/%.py,$(addprefix test_,benchmarks embedding_benchmark end_to_end examples no_network picture) \
	$(addprefix test_,readme sensitivity_chart torture trained wheel) \
	$(addprefix export/test_,bundle_writer cli folder_to_chat large own_decoders pipeline targets terminal verify_command) \
	$(addprefix export/graph/test_,clean embedding_rows fuse hidden_states last_logits output_head rotary save) \
	$(addprefix export/measure/test_,eval_command evaluate hidden_states predictors reference texts verify) \
	$(addprefix export/quantize/test_,activations int4 int8 int8_kv merge odd_weights report rewrite_decoders) \
	$(addprefix export/quantize/test_,sensitivity smoothing switches) \
	$(addprefix runtime/test_,chat cli draft_model generate hidden_states kept_tokens language_model strangers) \
	$(addprefix runtime/,commands/test_bench commands/test_inspection commands/test_terminal) \
	$(addprefix runtime/,bulk/test_generator bulk/test_job commands/test_batch) \
	$(addprefix runtime/constraints/test_,lazy matcher vocabulary) \
	$(addprefix runtime/speculation/test_,drafter worth) \
	$(addprefix runtime/,engine/test_engine engine/test_int8_kv engine/test_shift providers/test_open) \
	runtime/batching/test_exceptions \
	$(addprefix runtime/sandbox/test_,asynchronous batch chat_format child connection model rerun stream) \
	$(addprefix train/test_,checkpoint cli loop model place report stories))
QUICK := $(filter-out $(NOT_QUICK),$(wildcard $(addsuffix test_*.py,tests/ tests/*/ tests/*/*/)))
# What the oldest packages run: commands from text to text, and each source.
OLDEST_TESTS := $(addprefix tests/,train export/graph/test_clean.py export/graph/test_simplify.py \
	$(patsubst %,export/source/test_%.py,source pretrained pretrained_refused llama2c gguf) \
	export/test_folder_to_chat.py test_end_to_end.py test_examples.py)

# Other inputs to every reader, for MINUTES by random seeds, then for as long by atheris where pip has it.
MINUTES ?= 10

.PHONY: demo test quick fuzz check types ci matrix versions aarch64 wheel sbom torture soak further oldest runtime-oldest \
	runtime-newest figures bench docs clean

# From nothing to text: train on the built-in stories, export to fp32 and int8, prove it, tell a story.
demo: $(VENV)/installed
	$(PASTKEY) train --out demo/checkpoint --force
	$(PASTKEY) export demo/checkpoint --out demo/fp32 --precision fp32 --force
	$(PASTKEY) export demo/checkpoint --out demo/int8 --force
	$(BIN)/python -m benchmarks.stories demo/fp32 demo/int8
	$(BIN)/python examples/tell_story.py demo/int8

test: check types
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "$(CHOSEN)" $(PYTEST_ARGS)

quick: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(QUICK) $(PYTEST_ARGS)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/python tests/typecheck.py

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)
	-$(BIN)/python -m pip install --quiet --upgrade --target $(ENVIRONMENTS)/fuzz atheris
	if [ -d $(ENVIRONMENTS)/fuzz/atheris ]; then \
		PYTHONPATH=$(ENVIRONMENTS)/fuzz $(BIN)/python -m tests.fuzz --guided --minutes $(MINUTES); fi

# What CI runs, in less than 45 minutes on two cores: the tests, then a part of them in each further environment.
ci:
	$(MAKE) test SLOW=1
	$(MAKE) further

# By hand: what CI runs, every case of the tables of which CI has one of each kind, and every release of onnxruntime.
matrix:
	$(MAKE) test MATRIX=1
	$(MAKE) further
	for python in $(PYTHONS); do $(MAKE) runtime-newest PYTHON=$$python || exit; done
	$(MAKE) versions
	$(MAKE) aarch64

# Bundles that the newest onnxruntime made, loaded and run by each release from the oldest on: a line for each.
versions: $(VENV)/installed
	$(BIN)/python -m tests.versions

# The same by the runtime for arm64, which qemu emulates. On Debian; nothing is installed into the system.
aarch64: $(VENV)/installed
	$(BIN)/python -m tests.aarch64

# The wheel, the same bytes from the same files, and its sha256.
wheel: $(VENV)/installed
	$(BIN)/python -m tests.wheel dist

# What pip would install with each extra, or with those of EXTRAS, as CycloneDX documents.
EXTRAS ?=
sbom: $(VENV)/installed
	$(BIN)/python -m tests.sbom dist/sbom $(EXTRAS)

# Kills commands KILLS times, and lets each call that changes the disk fail: some hours on two cores. CI runs a few.
torture: $(VENV)/installed
	PASTKEY_KILLS=$(KILLS) $(BIN)/python -m pytest tests/test_torture.py $(PYTEST_ARGS)

# One model under sixteen threads for SOAK_MINUTES: right texts, and memory that does not grow.
soak: $(VENV)/installed
	PASTKEY_SOAK_MINUTES=$(SOAK_MINUTES) $(BIN)/python -m pytest -s tests/runtime/test_soak.py $(PYTEST_ARGS)

further:
	$(MAKE) oldest
	$(MAKE) runtime-oldest
	$(MAKE) runtime-newest PYTHON=$(NEWEST_PYTHON)
	$(MAKE) docs

# The oldest release of every package that pyproject.toml allows, where commands export, verify, run and chat. An old
# package may warn of a newer one beside it.
oldest: $(ENVIRONMENTS)/oldest/installed
	$(ENVIRONMENTS)/oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal -W default -m "not slow" \
		$(OLDEST_TESTS) $(PYTEST_ARGS)

$(ENVIRONMENTS)/oldest/installed: pyproject.toml $(OLDEST)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.[all,huggingface,gguf]' --constraint $(OLDEST) \
		pytest pytest-xdist hypothesis
	touch $@

# The runtime's tests on the wheel alone, away from the checkout: there is neither torch nor onnx.
runtime-oldest: CONSTRAINT := --constraint $(CURDIR)/$(OLDEST)
runtime-oldest runtime-newest: $(VENV)/installed
	rm -rf $(ENVIRONMENTS)/$@
	mkdir -p $(ENVIRONMENTS)/$@/away/tests
	$(BIN)/python -m tests.wheel $(ENVIRONMENTS)/$@/wheel
	cp -r tests/conftest.py tests/onnx_text.py tests/runtime $(ENVIRONMENTS)/$@/away/tests
	cp pyproject.toml $(ENVIRONMENTS)/$@/away
	$(PYTHON) -m venv $(ENVIRONMENTS)/$@
	$(ENVIRONMENTS)/$@/bin/python -m pip install --quiet \
		"$$(echo $(ENVIRONMENTS)/$@/wheel/*.whl)[cpu,chat,constrained,sign]" \
		$(CONSTRAINT) pytest pytest-xdist hypothesis jsonschema
	cd $(ENVIRONMENTS)/$@/away && ../bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

# The figures of `make demo` in docs/performance.md, measured again on this machine. Needs the bundles of `make demo`.
figures: $(VENV)/installed
	$(BIN)/python -m benchmarks.figures demo

# pastkey beside other engines on this machine, each installed in an environment of its own: benchmarks/results.md.
# `make bench BENCH_ARGS=--full` measures more engines and how pastkey scales. Then many streams at the same time, into
# docs/performance.md. The same command goes on after a stop.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.embedding

# The site of docs/ in site/. mkdocstrings reads an installed copy: its parser does not see the mapped folders of an
# editable install. It runs no code, so that the copy needs none of its dependencies.
docs: $(DOCS)/installed
	rm -rf build
	$(DOCS)/bin/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" $(DOCS)/bin/python -I -m mkdocs build --strict --quiet

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

# pip 25.1 is the first that knows dependency groups.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	touch $@

clean:
	rm -rf demo build dist site *.egg-info
