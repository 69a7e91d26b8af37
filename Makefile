# `make` lists the targets. Every target is one line of plain commands, also in CONTRIBUTING.md.
#
# PYTHON  the interpreter that makes the virtual environment (3.11 or newer)
# TORCH   what pip installs as torch; options may follow, as in TORCH="torch --index-url URL"
# VENV    the virtual environment; VENV= uses PYTHON as it is, and installs nothing
# WORKERS processes of the test run
# STAGE   one stage of `make gpu`, which benchmarks/gpu.py lists

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY := $(if $(VENV),$(VENV)/ready,build/ready)
EXTRAS := triton,demo,train,test,dev
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench report study fuzz docs aot gpu wheel clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(READY) ## virtual environment, torch, the compiled library, the package

demo: setup ## the main job: 20 handwritten digits, a picture and a table in outputs/
	$(PY) -m a3fta_kernels demo

test: setup lint ## set-up, lint, all tests, and what they could not run here
	$(PY) scripts/run_tests.py --workers $(WORKERS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup ## every op, backend and workload; saved bytes; whole training steps; calls of samplers
	$(PY) benchmarks/run.py
	$(PY) -m benchmarks.count_saved
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_inference.py

report: setup ## benchmarks/REPORT.md and its figures, from benchmarks/results
	$(PY) -m benchmarks.report

study: setup ## the runs of the study that are missing, hours of all cores, and benchmarks/STUDY.md
	$(PY) -m a3fta_kernels study --folder benchmarks/study/digits --report benchmarks/STUDY.md

fuzz: setup ## property tests at length: 5000 op cases, 20000 adapter files, 50 kills of a run, every family compiled
	A3FTA_FUZZ_CASES=5000 $(PY) -m pytest tests/ops -k property --timeout 0
	A3FTA_FUZZ_FILES=20000 $(PY) -m pytest tests/test_storage_fuzz.py --timeout 0
	A3FTA_FUZZ_KILLS=50 $(PY) -m pytest tests/train/test_resume.py --timeout 0
	A3FTA_COMPILE=1 $(PY) -m pytest tests/processors/test_families.py -k "graph or numbers"

docs: setup ## the reference of all public names, in build/docs
	$(PY) scripts/make_reference.py

aot: setup ## compile the Triton configurations that the committed table does not know, and renew it
	$(PY) -m benchmarks.aot

gpu: ## build for the GPU found, test, compute-sanitizer, benchmark; needs torch, no network
	$(PYTHON) benchmarks/gpu.py $(if $(STAGE),--stage $(STAGE))

wheel: setup ## an abi3 wheel and an sdist in dist/
	A3FTA_CUDA_ARCHS=all $(PY) -m build --no-isolation

clean: ## remove the virtual environment and everything built
	rm -rf build dist *.egg-info a3fta_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$(PYTHON) is older than 3.11: choose one with make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# a change of TORCH reinstalls, an equal one does not
$(VENV)/torch: $(VENV)/bin/python FORCE
	@[ "$$(cat $@ 2>/dev/null)" = '$(TORCH)' ] || { set -ex; $(PY) -m pip install "setuptools>=77" $(TORCH); echo '$(TORCH)' > $@; }

# the library first, which pip would build in silence and now finds
$(VENV)/ready: $(VENV)/torch setup.py pyproject.toml $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	$(PY) -m pip install --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

build/ready: setup.py $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@
