# make digest: from nothing to a page with slides. make test: everything the project promises.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: help install data digest evidence test test-engines lint typecheck tables docs bench clean

help:
	@echo "make digest   install, measure what is missing, draw the slides, write results/digest/index.html"
	@echo "              make digest MONTH=2021-09 does one month"
	@echo "make evidence measure all studies into evidence/quick, and fill tables and slides of the pages from there"
	@echo "make test     install, then lint, types and tests"
	@echo "make test-engines   the tests that start a Ray cluster and a Slurm of one node"
	@echo "make docs     fill the tables of papers and claims, build the site into site/"
	@echo "make bench    ours and our peers side by side, into benchmarks/RESULTS.md"
	@echo "make clean    remove the environment and caches (results/ stays)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlcollage needs Python 3.11 or newer; name one with make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@# BackPACK and laplace-torch ask for torchvision, whose wheel may be built for another torch than ours; a broken one
	@# takes others with it (transformers imports it when it is there), and nothing here needs it.
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall -q -y torchvision
	touch $@

install: $(STAMP)

data: $(STAMP)
	$(BIN)/mlcollage data prepare

digest: data
	$(BIN)/mlcollage digest $(MONTH)

evidence: data
	$(BIN)/mlcollage run all --until-settled --store evidence/quick
	$(BIN)/python docs/_site/tables.py --record evidence/quick

test: lint typecheck data
	$(if $(BROWSER),,@echo "No Chromium or Chrome here: the tests that load the pages in a browser are left out.")
	OMP_NUM_THREADS=1 $(if $(BROWSER),,MLCOLLAGE_NO_BROWSER=1) $(BIN)/python -m pytest -n auto --dist loadfile

# Not part of `make test`: Ray alone is a download of 70 MB, and Slurm's daemons need packages of the system and root.
# Slurm's tests are left out, with the reason, where slurmctld, slurmd and munge are not installed.
test-engines: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[ray,slurm]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/lab/test_slurm.py tests/lab/test_ray.py -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy

tables: $(STAMP)
	$(BIN)/python docs/_site/tables.py

docs: tables
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	$(BIN)/mlcollage bench all

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis site
