# Two commands for a fresh machine: `make validate` and `make test`.
# Both make .venv on their first run. To use an environment of your own instead: make test PY=python3
PYTHON ?= python3
TRITON_OLDEST := 3.6.0
TRITON_NEWEST := 3.9.0

ifdef PY
READY :=
else
PY := .venv/bin/python
READY := .venv/.ready
endif
# Tests on a GPU take turns: several processes would share its memory and its time. `make gpu-test` knows which may.
GPU = $(shell nvidia-smi -L 2>/dev/null | head -n 1)
TRITONS := $(TRITON_OLDEST:%=.venv-triton/%/.ready) $(TRITON_NEWEST:%=.venv-triton/%/.ready)

.PHONY: help validate test gpu-test lint docs report clean

help:
	@echo "make validate   is attention correct here, and how many microseconds does a sequence cost?"
	@echo "make test       the tests; those that need a GPU are skipped where there is none"
	@echo "make gpu-test   the tests that need a GPU, several at once, and what came of them in results/"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documents as a site in build/docs; warnings are errors"
	@echo "make report     write the documents' figures anew from results/"
	@echo "make clean      remove what the commands above made"

validate: $(READY)
	$(PY) -m flashcore.benchmark.expert_validation --json

test: $(READY) $(TRITONS)
	$(PY) -m pytest $(if $(GPU),,--numprocesses=auto)

gpu-test: $(READY)
	$(PY) tests/run_on_gpu.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(READY)
	$(PY) -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --builder html docs build/docs

report: $(READY)
	$(PY) -m flashcore.benchmark.report
	$(PY) -m flashcore.benchmark.plots
	$(PY) -m flashcore.benchmark.page

# With a GPU, the torch that $(PYTHON) already has is used as it is, wherever it lives: a .pth file names its folder.
# Without one, the pinned pair: see constraints-cpu.txt.
.venv/.ready: pyproject.toml constraints-cpu.txt
	@set -e; $(PYTHON) -m venv --clear .venv; \
	if gpu=$$(nvidia-smi -L 2>/dev/null | head -n 1) && [ -n "$$gpu" ]; then \
	  echo "setting up .venv for $$gpu"; \
	  site=$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(PYTHON) -c 'import torch, pathlib; print(pathlib.Path(torch.__path__[0]).parent)' >"$$site/torch.pth" 2>/dev/null \
	    || echo "$(PYTHON) has no torch: installing one"; \
	else \
	  echo "setting up .venv without a GPU"; \
	  pins='-c constraints-cpu.txt'; \
	fi; \
	.venv/bin/python -m pip install --quiet $$pins -e '.[dev]'
	@touch $@

# Other releases of Triton, beside the installed one and without a second torch: tests/test_triton_versions.py.
.venv-triton/%/.ready: | $(READY)
	@echo "adding triton $*"
	@$(PY) -m pip install --quiet --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

clean:
	rm -rf .venv .venv-triton build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
