# Needs make and Python >= 3.11 with its venv module; everything else goes into .venv, at the versions of constraints.txt.
PYTHON ?= python3
RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One torch thread in each test process: with more they wait for each other.
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist worksteal
# Of `make properties`: another one each time, unless one is given.
SEED := $(or $(SEED),$(shell date +%s))
# Modules are compiled when they are first imported (pip would compile all, in half of its time), and that once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test properties lint format bench notebooks docs matrix mutants audit wheel clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: .venv/installed-bench  ## Fit a nested classifier and an ordered VAE to real digits; the report lands in results/demo
	$(RUN) -m models demo

test: .venv/installed-dev  ## Run the tests and the doctests; with CI=true, fail below the floor of coverage, too
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS) $(if $(CI),--cov)

properties: .venv/installed-dev  ## Search for laws, nets and arguments of fit that break a property, for a quarter of an hour
	@echo "SEED=$(SEED) repeats this run"
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS) -m hypothesis --hypothesis-profile=long --hypothesis-seed=$(SEED) tests

lint: .venv/installed-dev  ## Check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: .venv/installed-dev  ## Format the code and repair what ruff can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: .venv/installed-bench  ## Measure the masks against their peers
	$(RUN) -m benchmarks.masks

notebooks: .venv/installed-notebooks  ## Run the notebooks from their scripts and keep the outputs
	$(RUN) -m jupytext --quiet --update --to ipynb notebooks/*.py
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(RUN) -m nbconvert --log-level ERROR --to notebook --inplace --execute \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(RUN) -m nbconvert --log-level ERROR --to notebook --inplace --coalesce-streams notebooks/*.ipynb

docs: .venv/installed-docs  ## Build the documentation into site; a warning is an error
	$(RUN) -m sphinx --conf-dir docs --doctree-dir build/doctrees --fresh-env --fail-on-warning --quiet . site
	@cp site/README.html site/index.html
	@echo "The documentation begins at site/index.html"

matrix: .venv/installed-dev  ## Test the core and the diagnostics with their lowest and newest dependencies, under each Python
	$(RUN) .ci/matrix.py

mutants: .venv/installed-mutants  ## Change the code in many places, one at a time: do the tests notice?
	$(RUN) .ci/mutants.py

audit: .venv/made  ## Look up known vulnerabilities of the versions in constraints.txt; needs the network
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.venv/audit/bin/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip

wheel: .venv/installed-dev  ## Build the wheel and run the examples of README.md in empty environments that have it
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow tests/test_wheel.py

clean:  ## Remove .venv, caches and build outputs; results/ stays
	rm -rf .venv build dist site *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, one for each extra: older than either file means that the environment is out of date.
.venv/made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "$(PYTHON) is missing or older than 3.11; name another one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module; on Debian install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed-%: .venv/made
	@echo "Installing into .venv, which takes a minute or two the first time"
	$(PIP) --no-compile -e '.[$*]'
	@touch $@

.PRECIOUS: .venv/installed-%
