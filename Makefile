# make dataset RECIPE=… INPUT=… OUT=… RAY_ADDRESS=…   (with none of them: the toy world, in out/toy)
# make train RECIPE=… DATA=… OUT=… RAY_ADDRESS=…      (with none of them: the toy world, in out/train-toy)
PYTHON ?= python3
VENV := .venv
SDD := $(VENV)/bin/sdd
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "make dataset takes RECIPE= INPUT= OUT= RAY_ADDRESS= and SET=\"key=value …\"; \`$(SDD) dataset --help\` explains them"
	@echo "make train takes RECIPE= DATA= OUT= RAY_ADDRESS= and SET=; \`$(SDD) train --help\` explains them"

dataset: $(VENV)/installed  ## images -> shards, and a contact sheet to look at (default: the toy world)
	@$(SDD) dataset $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(INPUT),--input '$(INPUT)') $(if $(OUT),--out '$(OUT)') \
		$(if $(RAY_ADDRESS),--ray-address '$(RAY_ADDRESS)') $(foreach pair,$(SET),--set '$(pair)')

TOY_DATA := $(patsubst %,out/%/contact-sheet.png,toy toy-individuals toy-held-out)

train: $(VENV)/installed $(if $(RECIPE),,$(TOY_DATA))  ## shards -> the subject model (default: on the toy world)
	@$(SDD) train $(if $(RECIPE),--recipe '$(RECIPE)') $(foreach path,$(DATA),--data '$(path)') $(if $(OUT),--out '$(OUT)') \
		$(if $(RAY_ADDRESS),--ray-address '$(RAY_ADDRESS)') $(foreach pair,$(SET),--set '$(pair)')

out/toy/contact-sheet.png: | $(VENV)/installed
	@$(SDD) dataset

out/toy-individuals/contact-sheet.png: | $(VENV)/installed
	@$(SDD) dataset --out out/toy-individuals --set toyworld.seed=2 --set toyworld.images=3000 --set toyworld.identities=60

out/toy-held-out/contact-sheet.png: | $(VENV)/installed
	@$(SDD) dataset --out out/toy-held-out --set toyworld.seed=1 --set toyworld.images=300

test: $(VENV)/installed-dev  ## every test: real Ray, real HTTP, the toy models
	@$(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/installed-dev  ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(VENV)/installed-dev  ## speed and memory, as ratios measured in one run
	@$(VENV)/bin/python benchmarks/stages.py && $(VENV)/bin/python benchmarks/pipeline.py && $(VENV)/bin/python benchmarks/stream.py

clean:  ## removes what was installed and made: .venv and out
	rm -rf $(VENV) out

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (once; several GB, a few minutes)"
	@$(PIP) install -c constraints.txt --config-settings editable_mode=compat -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) install -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch $@

.PHONY: help dataset train test lint bench clean
