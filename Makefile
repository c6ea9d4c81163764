# make piano · make test · make test-all · make book · make bench · make chapters · make clean
# Each sets up what it needs, in .venv. Another interpreter: make piano PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
START  := $(shell date +%s)
PIP    := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder
since   = $$(( $$(date +%s) - $(1) )) s

.PHONY: help piano test test-long test-all book bench chapters clean
.DELETE_ON_ERROR:

help:
	@head -n 2 Makefile

piano: $(VENV)/.installed
	@begin=$$(date +%s); \
	$(BIN)/pianodiff generate --seconds 20 --seed 7 --out piano.wav --image piano.png --force && \
	echo "piano.wav and piano.png: 20 s of music in $(call since,$$begin), $(call since,$(START)) with the installation"

# Ten minutes on two cores; `make test-long` runs what it leaves out, and `make test-all` both.
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not long"

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long

test-all: $(VENV)/.installed-dev
	$(PYTEST)

# Nothing is executed: the chapters' outputs are committed, and `make chapters` renews them.
book: $(VENV)/.installed-dev
	$(BIN)/jupyter-book build . --config book/_config.yml --toc _toc.yml --path-output book -W --keep-going -n -q
	@touch book/_build/html/index.html
	@echo "The book: book/_build/html/index.html"

# Appends to bench/results.jsonl and bench/growth.jsonl; the last two write the tables of book/at_scale.md and
# book/bench.md from them. Each also runs alone; bench/gpu.py is for a machine with a GPU.
BENCH := samplers sound network generation training growth scale table

bench: $(VENV)/.installed-dev
	@for name in $(BENCH); do echo "== bench/$$name.py"; $(BIN)/python bench/$$name.py || exit 1; done

# One chapter: make chapters NB=nbs/02_audio.ipynb
chapters: $(VENV)/.installed-dev
	$(BIN)/python book/execute.py $(NB)
	$(BIN)/nbdev_clean

clean:
	rm -rf piano.wav piano.png book/_build build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find pianodiff tests bench book nbs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pianodiff needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt settings.ini | $(VENV)/pyvenv.cfg
	$(PIP) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) '.[dev]'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps k-diffusion
	@touch $@
