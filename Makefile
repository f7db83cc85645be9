# make demo: distil the embedded teacher, the main job.   make test: everything CI checks.
# make comfy: a ComfyUI of its own with this pack in it, until Ctrl-C.
PYTHON ?= python3
BIN := .venv/bin
SET :=

.PHONY: demo test comfy

demo: .venv/runtime
	$(BIN)/python -m dmd_train demo $(SET)

test: .venv/runtime .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	bash tests/install_system.sh
	$(BIN)/python -m pytest

comfy: .venv/runtime .venv/test
	$(BIN)/python tests/kit/comfy_host.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.txt constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	touch $@

.venv/test: requirements-test.txt constraints.txt | .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-test.txt
	touch $@
