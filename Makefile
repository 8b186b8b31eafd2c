# make dataset RECIPE=… INPUT=… OUT=… RAY_ADDRESS=…   (with none of them: the toy world, in out/toy)
# make train RECIPE=… DATA=… OUT=… RAY_ADDRESS=…      (with none of them: the toy world, in out/train-toy)
PYTHON ?= python3
VENV := .venv
SDD := $(VENV)/bin/sdd
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "make dataset takes RECIPE= INPUT= OUT= RAY_ADDRESS= and SET=\"key=value …\"; \`$(SDD) dataset --help\` explains them"
	@echo "make demo takes MODEL=; \`$(SDD) demo --help\` explains it"
	@echo "make train takes RECIPE= DATA= OUT= RAY_ADDRESS= and SET=; \`$(SDD) train --help\` explains them"

dataset: $(VENV)/installed-$(if $(RECIPE),label,demo)  ## images -> shards, and a contact sheet to look at (default: the toy world)
	@$(SDD) dataset $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(INPUT),--input '$(INPUT)') $(if $(OUT),--out '$(OUT)') \
		$(if $(RAY_ADDRESS),--ray-address '$(RAY_ADDRESS)') $(foreach pair,$(SET),--set '$(pair)')

TOY_DATA := $(patsubst %,out/%/contact-sheet.png,toy toy-individuals toy-held-out)
TOY_RUN = $(or $(OUT),out/train-toy)

train: $(VENV)/installed-train $(if $(RECIPE),,$(TOY_DATA))  ## shards -> the subject model (default: on the toy world)
	@$(SDD) train $(if $(RECIPE),--recipe '$(RECIPE)') $(foreach path,$(DATA),--data '$(path)') $(if $(OUT),--out '$(OUT)') \
		$(if $(RAY_ADDRESS),--ray-address '$(RAY_ADDRESS)') $(foreach pair,$(SET),--set '$(pair)')
	$(if $(RECIPE),,@if [ -f '$(TOY_RUN)/pipeline/model_index.json' ]; then $(SDD) evaluate '$(TOY_RUN)'; fi)

out/toy/contact-sheet.png: | $(VENV)/installed-demo
	@$(SDD) dataset

out/toy-individuals/contact-sheet.png: | $(VENV)/installed-demo
	@$(SDD) dataset --out out/toy-individuals --set toyworld.seed=2 --set toyworld.images=3000 --set toyworld.identities=60

out/toy-held-out/contact-sheet.png: | $(VENV)/installed-demo
	@$(SDD) dataset --out out/toy-held-out --set toyworld.seed=1 --set toyworld.images=400 --set toyworld.identities=10

demo: $(VENV)/installed-page  ## a page in the browser that draws your subject (default: with what `make train` made)
	@$(SDD) demo $(if $(MODEL),'$(MODEL)')

test: $(VENV)/installed-dev  ## every test: real Ray, real HTTP, the toy models; TESTS=tests/stages: some of them
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/installed-dev  ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(VENV)/installed-dev  ## speed and memory, as ratios measured in one run
	@$(VENV)/bin/python benchmarks/stages.py && $(VENV)/bin/python benchmarks/actor.py && $(VENV)/bin/python -m benchmarks.engine && $(VENV)/bin/python benchmarks/pipeline.py && $(VENV)/bin/python benchmarks/stream.py && $(VENV)/bin/python benchmarks/sample.py

docs: $(VENV)/installed-dev  ## the documentation, in out/site
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

dist: $(VENV)/installed-dev  ## the wheel and the source archive, checked
	@rm -rf dist build
	@$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@$(VENV)/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	@$(VENV)/bin/python -m twine check --strict dist/*

clean:  ## removes what was installed and made: .venv, out, build and dist
	rm -rf $(VENV) out build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

# installed-demo, -label, -train, -page, -dev: the extras of pyproject.toml, each added to what is there already. Two OpenCVs
# overwrite each other, so that groundingdino-py comes without its dependencies, and one from before has to go; gradio
# does because it asks for an older Pillow.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what $* needs into $(VENV) (once; several GB with CUDA, a few minutes)"
	@if $(PIP) show opencv-python >/dev/null 2>&1; then $(PIP) uninstall -y opencv-python opencv-python-headless; fi
	@$(PIP) install -c constraints.txt --config-settings editable_mode=compat -e '.[$*]'
	@$(if $(filter dev page,$*),$(PIP) install -c constraints.txt --no-deps gradio hf-gradio)
	@$(if $(filter dev original,$*),$(PIP) install -c constraints.txt --no-deps groundingdino-py)
	@touch $@

.PHONY: help dataset train demo test lint bench docs dist clean
