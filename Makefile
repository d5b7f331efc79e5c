# Needs Python 3.11 or newer, and nothing else. PYTHON chooses another interpreter, VENV another folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-flower lint types examples check install clean

demo: $(VENV)/.installed-demo
	$(BIN)/cotune demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 --dist worksteal --durations 30

# Real SuperLink and SuperNodes, in an environment of their own.
test-flower:
	$(MAKE) VENV=.venv-flower .venv-flower/.installed-flower
	.venv-flower/bin/pytest tests/federation/flower tests/cli/test_federate_keys.py tests/cli/test_federate_prepare.py tests/cli/test_federate_result.py tests/integration/test_flower.py tests/cli/test_errors.py::test_a_wrong_token

# All in one step, so that one set of versions suits both: Flower's old typer needs an older transformers.
$(VENV)/.installed-flower: pyproject.toml constraints-flower.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-flower.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-flower.txt -e '.[dev,flower]'
	@touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

examples: $(VENV)/.installed-dev
	for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example || exit 1; done

check: lint types test examples

install: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cotune needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: without the constraint, pip would fetch gigabytes of CUDA packages.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cloud,train]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
