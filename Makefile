# One command each:  make demo   make test   make check   make bench
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
PIP    := $(VENV)/bin/pip install --prefer-binary --disable-pip-version-check

.PHONY: demo test check bench clean

demo: $(VENV)/.demo   ## the whole job on real weights; KEEP=1 keeps serving
	$(VENV)/bin/alight demo $(if $(KEEP),--keep)

test: $(VENV)/.dev    ## every test
	$(PY) -m pytest $(ARGS)

check: $(VENV)/.dev   ## lint, types, layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.dev   ## the measured figures that README and docs quote
	$(PY) benchmarks/footprint.py
	$(PY) benchmarks/planner.py
	$(PY) benchmarks/serving.py --quick

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llama-cpp-python is compiled here with this machine's own instructions. Set PIP_EXTRA_INDEX_URL to a
# wheel index (CPU, CUDA, Metal, …) to skip that.
$(VENV)/.engine: | $(VENV)/bin/python
	@echo "==> Installing llama.cpp. Without a wheel for this machine it is compiled: 5 to 15 minutes."
	$(PIP) -q llama-cpp-python==0.3.36
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.engine
	$(PIP) -q -e '.[demo]'
	@touch $@

# The CPU build of torch, before the extras would take the CUDA one (gigabytes) on x86-64 Linux. Set TORCH=torch
# to let pip choose, for instance on a machine with a GPU.
TORCH  ?= torch==2.13.0
$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) -q $(TORCH)
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.engine $(VENV)/.torch
	$(PIP) -q -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
