# `make demo` and `make test` need Python >= 3.10, pip and make; both set up .venv on first use and leave it alone afterwards.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)
bin := .venv/bin
install := $(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
frame := settings.ini setup.py pyproject.toml constraints.txt

.PHONY: help demo test test-all sync constraints clean

help:
	@echo "make demo         train, sample and measure on the embedded cohort; the report is outputs/demo/report.html"
	@echo "make test         every check: sync, notebooks, tests"
	@echo "make test-all     the same, with what is marked slow"
	@echo "make sync         export the notebooks, clean them, render README.md"
	@echo "make constraints  resolve constraints.txt anew (needs uv)"
	@echo "make clean        remove builds and caches; keeps .venv and outputs"

demo: .venv/run.stamp
	$(bin)/sbldm_demo

test: .venv/dev.stamp
	$(bin)/python tests/check_sync.py
	$(bin)/python tests/check_notebooks.py
	$(bin)/nbdev_test --n_workers 2 --do_print --timing
	$(bin)/python -m pytest tests -m "not slow" --numprocesses 2 --dist loadfile --durations=10

test-all: .venv/dev.stamp
	$(bin)/python tests/check_sync.py
	$(bin)/python tests/check_notebooks.py
	$(bin)/nbdev_test --n_workers 2 --do_print --timing --flags slow
	$(bin)/python -m pytest tests --numprocesses 2 --dist loadfile --durations=10

sync: .venv/dev.stamp
	$(bin)/nbdev_export
	$(bin)/nbdev_clean
	$(bin)/python scripts/make_readme.py

constraints: .venv/dev.stamp
	$(bin)/python scripts/make_constraints.py

clean:
	rm -rf build dist _docs _proc *.egg-info .pytest_cache
	find sbldm_nb nbs tests scripts -name __pycache__ -prune -exec rm -rf {} +

.venv/made.stamp:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found on PATH; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run.stamp: $(frame) | .venv/made.stamp
	@echo 'Installing sbldm_nb and what it needs into .venv (once, a few minutes) ...'
	$(install) -e .
	@touch $@

.venv/dev.stamp: $(frame) | .venv/made.stamp
	@echo 'Installing sbldm_nb with its development tools into .venv (once, a few minutes) ...'
	$(install) -e '.[dev]'
	@touch $@ .venv/run.stamp
