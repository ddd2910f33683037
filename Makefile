# make setup | demo | demo-compare | simulate | test | lint | gpu | gpu-triton | clean
# Everything is installed in .venv; delete it to start over.
SHELL := /bin/bash
CANDIDATES := python3.12 python3.13 python3.14 python3 python \
  $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.*/bin/python) \
  $(wildcard /opt/python*/bin/python3)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo

# make gpu PYTHON=python3 uses an interpreter that has jax with CUDA already, and installs nothing.
PYTHON ?=
GPU_RUN := $(or $(PYTHON),$(RUN))
GPU_MINUTES ?= 14

.PHONY: setup core demo demo-compare simulate test lint gpu gpu-triton clean

setup: $(VENV)/.dev
core: $(VENV)/.core

$(RUN):
	@for p in $(CANDIDATES); do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' \
	    >/dev/null 2>&1; then found="$$p"; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "No Python >= 3.12 with venv found. Install one (apt install python3.12-venv," \
	       "pyenv install 3.12, or uv python install 3.12) and run make again, or name it:" \
	       "make CANDIDATES=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; fi; \
	echo "Python: $$("$$found" --version) from $$found"; \
	"$$found" -m venv $(VENV)

$(VENV)/.core: requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.core

$(VENV)/.gpu: requirements-gpu.txt requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	@touch $@ $(VENV)/.core

demo: core
	$(RUN) -m freqformer.demo --workdir=$(WORKDIR)

demo-compare: core
	$(RUN) -m benchmarks.trained.demo_compare

# The page's trained q, k, v come from 120 steps of the demo's model with freqformer;
# runs/complexity is trained if it is not there. All on the CPU, also beside a GPU: a model trained
# elsewhere is another one.
simulate: export JAX_PLATFORMS := cpu
simulate: core
	$(RUN) -m freqformer.data.render data/comparison
	test -d runs/complexity/checkpoints || \
	  $(RUN) train.py --config=configs/comparison.py --workdir=runs/complexity --config.train.steps=120 \
	    --config.model.attention.method=freqformer
	$(RUN) -m benchmarks.pages.complexity

test: setup
	$(RUN) -m pytest -n 2 --dist=loadgroup tests

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Checks and conformance tests (which need pytest) first, then what is timed. Every step is killed
# when it overstays, and a second call goes on from the rows of the first.
gpu: $(if $(PYTHON),,$(VENV)/.gpu $(VENV)/.dev)
	$(GPU_RUN) -m benchmarks.gpu.slot --minutes=$(GPU_MINUTES)

# The same for Triton's kernels, beside cuDNN and, on a Hopper GPU, its own kernels.
gpu-triton: $(if $(PYTHON),,$(VENV)/.gpu $(VENV)/.dev)
	$(GPU_RUN) -m benchmarks.gpu.slot --plan=triton --minutes=7

clean:
	rm -rf $(VENV) .cache runs
