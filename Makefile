PYTHON ?= python3
RESULTS ?= bench/results
JOBS ?= 2
PIP_FLAGS ?=
OLDEST_TRITON := 3.6.0

BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)
export RESULTS

.PHONY: demo test test-all lint bench bench-compare claims studies gpu sheet

demo: .venv/.stamp
	$(BIN)/causalattn demo --figures out/figures --html out/report.html

test: .venv/.stamp
	$(PYTEST)

test-all: .venv/.stamp .triton-oldest/.stamp
	$(PYTEST) --full

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# LONG=1: the cases of minutes too
bench: .venv/.stamp
	$(BIN)/python -m pytest bench $(if $(LONG),--long)
	$(BIN)/python bench/report.py

bench-compare: .venv/.stamp
	$(BIN)/python bench/compare.py $(BASE)

claims: .venv/.stamp
	$(BIN)/python -m pytest -q tests/test_claims.py --claims docs/claims.md

studies: .venv/.stamp
	for study in $$(grep -l '^STUDY = ' studies/*.py); do OMP_NUM_THREADS=1 $(BIN)/python $$study > /dev/null || exit 1; done

sheet: .venv/.stamp
	$(BIN)/python bench/kernel_sheet.py

# a machine with CUDA keeps its own torch and Triton: no .venv, nothing installed
gpu: JOBS = 8
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make gpu needs a $(PYTHON) whose torch sees a CUDA device" >&2; exit 1; }
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PYTHON) -m pytest -q -n $(JOBS)
	PYTHONPATH=. $(PYTHON) -m pytest bench

.venv/.stamp: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "causalattn needs Python 3.11 or newer; name one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[all]'
	touch $@

.triton-oldest/.stamp: .venv/.stamp Makefile
	rm -rf .triton-oldest
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps --target .triton-oldest triton==$(OLDEST_TRITON)
	touch $@
