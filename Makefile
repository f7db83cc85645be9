# make demo: distil the embedded teacher, the main job.   make test: everything CI checks.
# make quick: lint, types and the quick unit tests, in two minutes.   make format: ruff's own way.
# make lowest: the demo, short, and the quick unit tests on the oldest versions that are allowed.
# make comfy: a ComfyUI of its own with this pack in it, until Ctrl-C.
PYTHON ?= python3
BIN := .venv/bin
SET :=

.PHONY: demo test quick lowest lint format comfy

demo: .venv/runtime
	$(BIN)/python -m dmd_train demo $(SET)

# two workers, a ComfyUI each: what two cores hold
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

test: lint
	bash tests/install_system.sh
	$(PYTEST)

quick: lint
	$(PYTEST) -m "not long" tests/unit

# exactly what requirements.txt begins at, in a venv of its own
LOWEST := .venv-lowest
lowest:
	$(PYTHON) -m venv $(LOWEST)
	sed 's/>=/==/' requirements.txt > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check \
		-r $(LOWEST)/requirements.txt pytest tensorboard
	$(LOWEST)/bin/python -m dmd_train demo \
		--set steps=200 --set pairs=1000 --set output=runs/lowest $(SET)
	$(LOWEST)/bin/python -m pytest -m "not long" tests/unit

lint: .venv/runtime .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/runtime .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

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
