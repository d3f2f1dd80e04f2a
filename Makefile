# Two commands set everything up: `make demo` runs the main job, `make test` the gate. Both may be repeated.
# `make test-peer` merges with the real mergekit too, in an environment of its own, and compares.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER_VENV := .venv-peer

.PHONY: demo lint test test-peer docs bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demo/run.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

test: lint
	$(BIN)/pytest -n auto --dist loadgroup

$(PEER_VENV)/.installed: constraints.txt
	test -x $(PEER_VENV)/bin/python || $(PYTHON) -m venv $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch==2.13.0 mergekit==0.1.5 transformers==5.24.0
	touch $@

test-peer: $(VENV)/.installed $(PEER_VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/peer

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/fold.py

clean:
	rm -rf $(VENV) $(PEER_VENV) demo/work demo/report.html
