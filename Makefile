# Two commands matter: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: help setup demo test lint reference constraints clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with every package at its tested version

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Weft needs Python 3.11 or newer as '$(PYTHON)'; name another one with: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python cannot make virtual environments here; mend it with: sudo apt-get install python3-venv" >&2; exit 3; }
	@echo "setting up $(VENV): the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[models,test]'
	@touch $@

demo: setup ## digit detector and language model: quantize, compile, run on the engine's RTL, compare, report
	$(BIN)/weft demo

test: setup ## all tests, JOBS=2 at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# mypy does not look into editable installs whose folders are mapped, so it gets the package as links.
lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	@mkdir -p build/typing/weft && for part in weft/* arch models compiler hw sim boards sw reports; do \
	  ln -sfn "$(CURDIR)/$$part" build/typing/weft/; done
	MYPYPATH=build/typing $(BIN)/mypy

reference: setup ## write the reference pages again, from the declarations in arch/
	$(BIN)/python -m weft.sw.reference_pages

constraints: setup ## record the installed versions as the tested ones
	@{ echo "# What the tests passed with; written by 'make constraints'."; \
	  $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//' | LC_ALL=C sort -f; } > constraints.txt

clean: ## remove what was built, keep .venv
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis sim_build
