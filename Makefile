# The commands of the README, which need only Python 3.11+.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long lint format clean

demo: $(VENV)/demo.stamp
	$(BIN)/qkv demo

# Tests compute with one thread each, so that two cores do two files at a time.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-long: $(VENV)/test.stamp
	$(BIN)/pytest -m long

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs/demo

# A stamp says which extra is installed, and is older than the files that decide what that means.
$(VENV)/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$*]' --constraint constraints.txt
	touch $@
