# Everything runs in .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# For more options to the main job: make profile ARGS="--size 39M --steps 4"
ARGS ?=
# Processes of make test, of one thread each: one more than cores, one where there is a GPU; 0 for pytest's own alone (a
# debugger).
WORKERS ?= auto

.PHONY: help profile test check format readme inventory bench-kernels gpu-check tune static-baseline attention-static hub-kernels emulate emulate-page closed-world clean

help:
	@echo "make profile   measure what sampling costs on this machine (ARGS=... goes to ldmperf profile)"
	@echo "make test      run the whole test suite"
	@echo "make check     lint, format and types"
	@echo "make format    rewrite the code in the house format"
	@echo "make readme    write the figures of README.md and docs/results.md from committed records"
	@echo "make inventory write the tables of launches, predicted without a GPU, and of what the drop-in replaces"
	@echo "make bench-kernels    measure each kernel beside its peers (ARGS=... goes to ldmperf kernels)"
	@echo "make gpu-check        all that a GPU machine is for, the most important first, within 9 minutes (ARGS=--plan)"
	@echo "make tune ARGS=geglu  search the launch configurations of a kernel on this GPU"
	@echo "make static-baseline  write bench/static/ for the installed triton: what it makes of the kernels"
	@echo "make attention-static write docs/attention.md's table: attention beside a textbook kernel, predicted without a GPU"
	@echo "make emulate   run tests/interpreter on compiled kernels, without a GPU (ARGS=--emulate=sm_80)"
	@echo "make emulate-page     write the tables of docs/emulate.md: every operator and every mutant in the emulator"
	@echo "make closed-world     train, sample and judge small networks, hours of two cores (ARGS=--help)"
	@echo "make hub-kernels   write build/hub-kernels/, a repository for Hugging Face's kernel hub, from kernels/"
	@echo "make clean     remove .venv and caches, never runs/"

profile: $(STAMP)
	$(BIN)/ldmperf profile $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(STAMP)
	$(BIN)/python bench/readme.py

inventory: $(STAMP)
	$(BIN)/python bench/inventory.py
	$(BIN)/python bench/drop_in.py
	$(BIN)/python bench/drop_in_models.py

bench-kernels: $(STAMP)
	$(BIN)/ldmperf kernels $(ARGS)

gpu-check: $(STAMP)
	$(BIN)/python bench/gpu_check.py $(ARGS)

tune: $(STAMP)
	$(BIN)/python bench/tune.py $(ARGS)

static-baseline: $(STAMP)
	$(BIN)/python bench/static_baseline.py $(ARGS)

attention-static: $(STAMP)
	$(BIN)/python bench/attention_static.py $(ARGS)

hub-kernels: $(STAMP)
	$(BIN)/python bench/hub_kernels.py $(ARGS)

emulate: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -p ldmperf.emulate tests/interpreter $(ARGS)

emulate-page: $(STAMP)
	$(BIN)/python bench/emulate_page.py $(ARGS)

closed-world: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=bench $(BIN)/python -P -m closed_world $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldmperf needs Python 3.11 or later; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,cluster]'
	@touch $@
