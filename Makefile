# Every task works alone on a bare checkout with make and Python 3.11 to 3.13: it makes .venv first where there is none.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
# A GPU machine may have a torch of its own and no network: PYTHON_ENV=python3 takes that Python as it is.
PYTHON_ENV ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.12 make ...  chooses the Python that makes .venv"
	@echo "PYTHON_ENV=python3 make bench-gpu  takes that Python as it is, with its torch, and installs nothing"
	@echo "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make ...  takes the small torch without CUDA"

demo: .venv/installed  ## study a small model over the whole dial; writes study/study.json and study/report.html
	$(BIN)/gqa study --out study

test: .venv/installed  ## run the tests; PYTEST_ARGS chooses some
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/installed  ## formatting, lint, types and the layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/installed-bench  ## time attention on this CPU against its peers; BENCH_ARGS="--rows full" for every shape
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

bench-gpu: $(if $(PYTHON_ENV),,.venv/installed)  ## test attention on this machine's GPU and time it against its peers, in nine minutes
	PYTHONPATH=src $(or $(PYTHON_ENV),$(BIN)/python) benchmarks/gpu.py --tests $(BENCH_ARGS)

clean:  ## remove what these tasks made: .venv, study/, caches
	rm -rf .venv study dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"error: Python 3.11 to 3.13 is needed\ngot: {sys.version.split()[0]}\nhint: PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: about a gigabyte and a few minutes at the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip \
	  && $(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev \
	  || { echo "error: the installation failed\nhint: it needs a package index (PyPI or your mirror); make goes on where it was" >&2; exit 1; }
	@touch $@

# The peers that benchmarks compare with.
.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group bench
	@touch $@
