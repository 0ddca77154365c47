# `make demo` and `make test` are all the set-up that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: typecheck
typecheck:
	@mkdir -p .typecheck && ln -sfn .. .typecheck/refrag
	MYPYPATH=.typecheck $(BIN)/mypy -p refrag.cli -p refrag.pipelines -p refrag.schemas -p refrag_core
