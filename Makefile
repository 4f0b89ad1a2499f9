# Every goal sets itself up: a fresh clone needs Python 3.10 or later, make and git.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2
ROOMS  := $(sort $(wildcard nbs/*.ipynb nbs/guides/*.ipynb))

# One thread for each of the parallel workers: more only makes them fight for the cores.
QUIET  := OMP_NUM_THREADS=1 IN_TEST=1 FTLIB_CACHE=$(abspath $(VENV))/cache
# What is checked does not hang on which arithmetic was faster a moment ago; FTLIB_PRECISION=bf16 make notebooks tries the other.
QUIET  += FTLIB_PRECISION=$(or $(FTLIB_PRECISION),fp32)
# Warnings of libraries to their developers, kept out of saved outputs.
QUIET  += PYTHONWARNINGS='ignore:IProgress not found,ignore:`torch.jit,ignore::DeprecationWarning'

.PHONY: help setup test gate notebooks outputs pytest docs demo slow faults bench clean

help:
	@echo "make demo   train on solar cells (or digits), print the table, write the plots: at most five minutes"
	@echo "make test   all that is checked before a change goes in"
	@echo "make test NB=nbs/45_lr.schedule.ipynb   one notebook; T=tests/test_data.py one file of tests"
	@echo "make outputs NB=nbs/45_lr.schedule.ipynb   run a notebook, keep its outputs, write its module"
	@echo "make slow   the long tests and the slow cells of notebooks; SOAK=2000 operations in random order"
	@echo "make docs   the site, in docs/_build/html"
	@echo "make faults trainings killed 200 times at random moments; each must end on the same weights"
	@echo "make bench  what importing ftlib costs beside fastai"
	@echo "make clean  remove what the others made, the environment too"

setup: $(READY)

$(READY): pyproject.toml setup.cfg
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"ftlib wants Python 3.10 or later; $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo]'
	@touch $@

# make test NB=nbs/45_lr.schedule.ipynb or T=tests/test_data.py runs these alone.
ifneq ($(strip $(NB)$(T)),)
test: $(READY)
	$(if $(NB),$(QUIET) $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -p no:cacheprovider -q $(NB))
	$(if $(T),$(QUIET) $(BIN)/python -m pytest -q $(T))
else
test: gate
	$(MAKE) notebooks
	$(MAKE) docs
	$(MAKE) pytest
endif

gate: $(READY)
	$(BIN)/python .ci/gate.py

notebooks: $(READY)
	@test -n "$(ROOMS)" || { echo "no notebook under nbs/: nothing would be run"; exit 1; }
	$(QUIET) $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -p no:cacheprovider -q -n $(JOBS) --dist worksteal $(ROOMS)

outputs: $(READY)
	@test -n "$(NB)" || { echo "which? make outputs NB=nbs/45_lr.schedule.ipynb"; exit 1; }
	$(BIN)/nbdev-export
	$(QUIET) $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -p no:cacheprovider -q --overwrite $(NB)
	for nb in $(NB); do $(BIN)/nbdev-clean --fname $$nb; done
	$(BIN)/python docs/readme.py

pytest: $(READY)
	$(QUIET) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests

docs: $(READY)
	$(QUIET) $(BIN)/python docs/pages.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs docs/pages docs/_build/html
	@echo "docs: open docs/_build/html/index.html"

demo: $(READY)
	$(BIN)/ftlib demo

slow: $(READY)
	SOAK=$(or $(SOAK),2000) $(QUIET) $(BIN)/python -m pytest -q -m slow tests
	$(BIN)/nbdev-test --flags slow --n-workers 1 --timing

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/faults.py --kills $(or $(KILLS),200)

bench: $(READY)
	$(BIN)/python bench/import_time.py

clean:
	rm -rf $(VENV) build dist ftlib.egg-info docs/_build docs/pages runs _proc .pytest_cache
