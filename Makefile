# Two commands: `make demo` and `make test`. Both set everything up in .venv first. `make help` lists all.
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
DOCS := .venv-docs
JAVASCRIPT := $(ENVIRONMENTS)/javascript
# `make test SLOW=1` adds the slow tests that CI runs, `make test MATRIX=1` all. WORKERS processes share the tests.
PYTEST_ARGS ?=
SLOW ?=
MATRIX ?=
CHOSEN = $(if $(MATRIX),,$(if $(SLOW),not matrix,not slow))
WORKERS ?= 2
BENCH_ARGS ?=
TIMES := $(CURDIR)/.environments/times
TESTS = -m pytest -n $(WORKERS) --dist worksteal --junitxml $(TIMES)/$(1).xml
COMPILER := $(shell command -v c++)

.PHONY: help demo test quick slowest check kernels sanitize web-assets ci release matrix oldest runtime-oldest runtime-newest bench docs javascript clean

help:
	@sed -n 's/^\([a-z][a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "Tools: $(BIN)/python -m tools.{versions,aarch64,wheel,sbom}; CONTRIBUTING.md has more"

demo: $(VENV)/installed $(if $(COMPILER),$(VENV)/kernels)  ## From built-in stories to text in three minutes: train, export to int8 with its proof, tell a story
	$(PASTKEY) train --out demo/checkpoint --force
	$(PASTKEY) export demo/checkpoint --out demo/int8 --force
	$(BIN)/python examples/tell_story.py demo/int8
	@printf 'next:  %s\n' '$(PASTKEY) run demo/int8 --prompt "Once upon a time a fox" --temperature 0.7' \
		'$(PASTKEY) see demo/int8 --prompt "Once upon a time" --out demo/see.html' '$(PASTKEY) serve demo/int8'

test: $(VENV)/installed  ## ruff, mypy, kernels and tests: SLOW=1 as CI, MATRIX=1 all, PYTEST_ARGS="tests/runtime -k cache"
	$(MAKE) --jobs 2 --output-sync check $(if $(COMPILER),kernels)
	$(BIN)/python $(call TESTS,test) -m "$(CHOSEN)" $(PYTEST_ARGS)
	$(if $(COMPILER),,@echo "The native kernels were NOT tested: there is no C++ compiler (c++).")

quick: $(VENV)/installed  ## The tests that neither train nor export, in seconds
	$(BIN)/python $(call TESTS,quick) -m quick $(PYTEST_ARGS)

slowest: $(VENV)/installed  ## The fifty slowest tests of the last runs, and the sum of each folder
	$(BIN)/python -m tools.slowest

check: $(VENV)/installed  ## ruff, mypy, and the format of the C++
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --style file:kernels/.clang-format --dry-run --Werror kernels/csrc/*.cc kernels/csrc/*.h kernels/csrc/*.inl tests/kernels/*.cc examples/genai/*.cc
	$(BIN)/python -m tools.typecheck

kernels: $(VENV)/kernels  ## Build the native kernels with a C++ compiler, for the tests and your bundles: docs/devices.md

$(VENV)/kernels: $(VENV)/installed $(shell git ls-files kernels 2>/dev/null)
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps ./kernels
	touch $@

# Python itself has none of the sanitizers, so that the processes that run graphs load one first.
sanitize: $(VENV)/kernels  ## The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pip install --quiet --upgrade --target $(ENVIRONMENTS)/sanitize \
		--config-settings=cmake.define.PASTKEY_SANITIZE=ON ./kernels
	PASTKEY_SANITIZED=$(CURDIR)/$(ENVIRONMENTS)/sanitize/pastkey_kernels/libpastkey_kernels.so \
		$(BIN)/python $(call TESTS,sanitize) -m "not slow" tests/kernels/test_matmul.py tests/kernels/test_attention.py \
		tests/kernels/test_refused.py tests/kernels/test_random.py

web-assets: $(VENV)/installed  ## Install the JavaScript libraries of `pastkey web` with npm: docs/web.md
	$(BIN)/python -m tools.web_assets

# The runtime's own tests run in runtime-oldest and runtime-newest, where there is neither torch nor the kernels.
ci:  ## What CI runs: the slow tests, then parts in further environments, kernels under sanitizers, JavaScript, docs
	PASTKEY_REQUIRE=kernels,node,chromium $(MAKE) test SLOW=1 PYTEST_ARGS="--ignore tests/runtime"
	$(MAKE) oldest
	$(MAKE) runtime-oldest
	$(MAKE) runtime-newest
	$(MAKE) sanitize
	$(MAKE) javascript
	$(MAKE) docs
	$(MAKE) slowest

release: $(VENV)/installed  ## Both sdists and wheels in dist/, tried on two Pythons: docs/dev/releasing.md
	$(BIN)/python -m pip install --quiet --group release
	$(BIN)/python -m tools.release dist --python $(PYTHON) --python $(NEWEST_PYTHON)

# In parts of at most an hour: `make matrix PYTEST_ARGS=tests/export`, then tests/runtime, then tests/programs.
matrix:  ## By hand: every case of each table, every Python here, every release of onnxruntime, arm64
	$(MAKE) test MATRIX=1
	for python in $(PYTHONS); do $(MAKE) runtime-newest NEWEST_PYTHON=$$python || exit; done
	$(BIN)/python -m tools.versions
	$(BIN)/python -m tools.aarch64

# One end to end of each extra, with the oldest release of every package. An old one may warn of a newer one next to it.
oldest: $(ENVIRONMENTS)/oldest/installed
	$(ENVIRONMENTS)/oldest/bin/python $(call TESTS,oldest) -W default -m oldest $(shell grep -rl "mark.oldest" tests --include="test_*.py") $(PYTEST_ARGS)

$(ENVIRONMENTS)/oldest/installed: pyproject.toml $(OLDEST)
	$(PYTHON) -m venv --clear $(@D)
	PYTHONWARNINGS="ignore:Editable installation" \
		$(@D)/bin/python -m pip install --quiet --editable '.[all]' --constraint $(OLDEST) \
		pytest pytest-xdist hypothesis
	touch $@

# The runtime's tests on the wheel alone, away from the checkout: there is neither torch nor onnx.
runtime-oldest: CONSTRAINT := --constraint $(CURDIR)/$(OLDEST)
# Private: the tools that build the wheel keep their own Python.
runtime-newest: private PYTHON = $(NEWEST_PYTHON)
runtime-oldest runtime-newest: $(VENV)/installed
	rm -rf $(ENVIRONMENTS)/$@
	mkdir -p $(ENVIRONMENTS)/$@/away/tests
	$(BIN)/python -m tools.wheel $(ENVIRONMENTS)/$@/wheel
	cp -r tests/conftest.py tests/onnx_text.py tests/runtime $(ENVIRONMENTS)/$@/away/tests
	cp pyproject.toml $(ENVIRONMENTS)/$@/away
	$(PYTHON) -m venv $(ENVIRONMENTS)/$@
	$(ENVIRONMENTS)/$@/bin/python -m pip install --quiet \
		"$$(echo $(ENVIRONMENTS)/$@/wheel/*.whl)[cpu,chat,constrained,sign]" \
		$(CONSTRAINT) pytest pytest-xdist hypothesis jsonschema pydantic
	cd $(ENVIRONMENTS)/$@/away && ../bin/python $(call TESTS,$@) \
		-m "not $(if $(filter %newest,$@),matrix,slow)" $(PYTEST_ARGS)

bench: $(VENV)/installed  ## pastkey and other engines, then many streams: benchmarks/results.md, docs/performance.md
	$(BIN)/python -m benchmarks peers --page benchmarks/results.md $(BENCH_ARGS)
	$(BIN)/python -m benchmarks streams --page docs/performance.md
	$(BIN)/python -m benchmarks pictures

# mkdocstrings reads an installed copy: its parser does not see the mapped folders of an editable install. It runs no
# code, so that the copy needs none of its dependencies.
docs: $(DOCS)/installed  ## The site of docs/ in site/
	rm -rf build
	$(DOCS)/bin/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" $(DOCS)/bin/python -I -m mkdocs build --strict --quiet

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

javascript: $(JAVASCRIPT)/installed  ## prettier and tsc over all JavaScript
	$(JAVASCRIPT)/node_modules/.bin/prettier --config tools/javascript/package.json --check \
		$(shell git ls-files tools/javascript '*.css' '*.html' '*.js' '*.mjs')
	$(JAVASCRIPT)/node_modules/.bin/tsc --project tools/javascript
	$(JAVASCRIPT)/node_modules/.bin/tsc --project tools/javascript/see.json

$(JAVASCRIPT)/installed: tools/javascript/package.json
	rm -rf $(@D)
	mkdir -p $(@D)
	cp $< $(@D)
	cd $(@D) && npm install --silent --no-audit --no-fund
	touch $@

# pip 25.1 is the first that knows dependency groups.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "pastkey needs Python 3.11 or newer: name one, such as  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	PYTHONWARNINGS="ignore:Editable installation" \
		$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	touch $@

clean:
	rm -rf demo build dist site *.egg-info
