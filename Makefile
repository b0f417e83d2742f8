# Every target first makes sure that .venv is there and up to date; nothing outside this folder
# changes.
#
#   make PYTHON=python3.12          another interpreter for .venv (3.11 to 3.13)
#   make generate SP=1 MODEL=DIR INPUT=FILE ARGS="..."   other degrees, model, prompts or flags
#   make serve PORT=8001 TP=2 MODEL=DIR ARGS="..."       the same for the server

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

MODEL ?= sps2-tiny
INPUT ?=
OUTPUT ?= out/answers.jsonl
TP ?= 1
SP ?= 2
PORT ?= 8000
JOBS ?= 3
ARGS ?=
DS_ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: setup generate serve test test-fast test-megatron checkpoint-table test-gpu lint format type docs bench train accuracy evaluate doctor clean help
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## .venv with the versions of constraints.txt

# torch first and alone: what comes later must accept the build that is there (CPU or CUDA).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv failed: is the package python3-venv installed?" >&2; exit 1; }
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

generate: setup ## answer the bundled prompts with the bundled model on SP=2 ranks
	@mkdir -p $(dir $(OUTPUT))
	PATH="$(BIN):$$PATH" DS_ACCELERATOR=$(DS_ACCELERATOR) $(BIN)/deepspeed --num_gpus $$(($(TP) * $(SP))) \
		--master_port $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') \
		launch/generate.py --model $(MODEL) --tp $(TP) --sp $(SP) $(if $(INPUT),--input $(INPUT)) \
		--output $(OUTPUT) --overwrite $(ARGS)

serve: setup ## OpenAI-compatible server of the bundled model on SP=2 ranks, at PORT=8000
	exec $(BIN)/sps2 serve --model $(MODEL) --tp $(TP) --sp $(SP) --port $(PORT) $(ARGS)

# Files go to JOBS processes, each with ranks of its own; JOBS=0 runs all in one, which is easier to
# follow.
test: setup ## the whole CPU test suite, ranks on gloo, JOBS=3 test files at a time
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15 -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup ## tests without ranks
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_style.py tests/docs/test_vocabulary.py tests/unit tests/histories tests/simulator tests/kernels -m "not slow" $(ARGS)

# Another release of megatron-core, in front of .venv's own, with that release's own dependencies
# unasked: those of .venv serve all of them. Releases from 0.17 on declare Python 3.12, and run on
# 3.11 as well, so the interpreter is .venv's.
VERSION ?= 0.19.2
MEGATRON := $(CURDIR)/.megatron/$(VERSION)
RELEASE_TESTS := tests/dist/test_megatron_release.py $(if $(SHORT),,tests/dist/test_megatron.py tests/dist/test_equals_transformers.py tests/dist/checkpoint)

$(MEGATRON)/.installed: $(STAMP)
	$(PIP) install --quiet --no-deps --ignore-requires-python --upgrade --target $(MEGATRON) megatron-core==$(VERSION)
	@touch $@

test-megatron: $(MEGATRON)/.installed ## equality tests with megatron-core VERSION=0.19.2 (SHORT=1: one model)
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 SPS2_TEST_MEGATRON=$(VERSION) PYTHONPATH=$(MEGATRON) \
		$(BIN)/python -m pytest --durations=5 $(RELEASE_TESTS) $(ARGS)

checkpoint-table: setup ## docs/checkpoints.md's table, from folders that releases of megatron-core write
	PATH="$(BIN):$$PATH" $(BIN)/python tests/checkpoint_table $(ARGS)

test-exhaustive: setup ## long forms of tests with drawn settings and folders (two minutes)
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m exhaustive tests/dist/checkpoint $(ARGS)

test-gpu: setup ## tests that need CUDA devices
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m gpu $(ARGS)

lint: setup ## ruff, the import layers and the figures of tools/house.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/house.py --check

format: setup ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## mypy, strict on the parts without torch
	$(BIN)/mypy

docs: setup ## the documentation as a site in out/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

bench: setup ## compare with transformers generate
	PATH="$(BIN):$$PATH" $(BIN)/python benchmarks/generate.py $(ARGS)

train: setup ## train the bundled model again into out/train, and evaluate it (70 minutes on one core)
	PATH="$(BIN):$$PATH" $(BIN)/python benchmarks/train_tiny.py $(if $(THREADS),--threads $(THREADS)) --output out/train $(ARGS)

# One run per length: runs of other lengths may share a machine, and an interrupted one costs less.
ACCURACY_LENGTHS ?= 1024 2048 4096
accuracy: setup ## measure what attention settings cost in accuracy, for docs/accuracy.md (40 minutes on one core)
	for length in $(ACCURACY_LENGTHS); do \
		$(BIN)/python benchmarks/eval_accuracy.py --seeds 0 1 2 --tasks key_value reference copy second_turn --texts 4 \
			--probes $$([ $$length = 2048 ] && echo 2 || echo 1) --lengths $$length --name accuracy-$$length \
			--output out/accuracy $(if $(THREADS),--threads $(THREADS)) $(ARGS) || exit 1; \
	done
	$(BIN)/python benchmarks/eval_accuracy.py --name accuracy \
		--merge $(foreach length,$(ACCURACY_LENGTHS),out/accuracy/accuracy-$(length).json)

evaluate: setup ## simulate comparisons again, tables and pictures of docs/evaluation.md (10 minutes; ARGS=--full for all)
	$(BIN)/python benchmarks/evaluate.py $(ARGS)

doctor: setup ## what this machine has and what will be used
	$(BIN)/sps2 doctor

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) .megatron out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
