# Every command of Pretext. `make help` lists them; each target sets up .venv first if it is missing or stale.
.DEFAULT_GOAL := help
SHELL := /bin/sh
export PYTHONUNBUFFERED := 1
PY := .venv/bin/python

# NAME counts only if it is typed: some systems keep the machine's name in the environment
TYPED_NAME := $(if $(filter command,$(origin NAME)),$(NAME))
# variables of the command line become overrides; ARGS="key=value ..." is passed on unchanged
COMMON := $(if $(SEED),seed=$(SEED)) $(if $(DEVICES),trainer.devices=$(DEVICES))
TRAIN  := $(if $(EXP),experiment=$(EXP)) $(if $(SCALE),scale=$(SCALE)) $(if $(DATA),data=$(DATA)) \
          $(if $(DATA_DIR),paths.data='"$(DATA_DIR)"') $(if $(CKPT),checkpoint='"$(CKPT)"') \
          $(if $(TYPED_NAME),run.name='"$(TYPED_NAME)"') $(COMMON)

.PHONY: help setup train submit resume evaluate gauntlet export config list pages new bench claim claims tensorboard test lint format clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make train EXP=mae_vitb [SCALE=paper|smoke|tiny] [DATA=emoji] [DATA_DIR=...] [CKPT=...]"
	@echo "             [NAME=...] [SEED=0] [DEVICES=2] [ARGS=\"data.batch_size=64 trainer.max_epochs=5\"]"

setup: ## make .venv (the other targets do it themselves)
	@tools/setup.sh

train: setup ## train an experiment: EXP=mae_vitb (without EXP: the list)
	@$(PY) -m src.train $(TRAIN) $(ARGS)

submit: setup ## train under SLURM, as EXP=... but with NODES=2 DEVICES=8 ARGS="cluster.slurm_partition=gpu"
	@$(PY) -m src.submit $(TRAIN) $(if $(NODES),trainer.num_nodes=$(NODES)) $(ARGS)

resume: setup ## continue a run, to the same bits: RUN=runs/<experiment>/<name>
	@$(PY) -m src.resume run='$(RUN)' $(if $(DEVICES),trainer.devices=$(DEVICES)) $(ARGS)

evaluate: setup ## evaluate a run's encoder: RUN=... EVAL=knn,linear,finetune [DATA=emoji]
	@$(PY) -m src.evaluate run='$(RUN)' $(if $(EVAL),eval=$(EVAL)) $(if $(DATA),data=$(DATA)) \
	  $(if $(DATA_DIR),paths.data='"$(DATA_DIR)"') $(ARGS)

gauntlet: setup ## rank several runs' encoders by many tasks: RUN="runs/a/x runs/b/y" [DATA=emoji]
	@$(PY) -m src.gauntlet run='$(RUN)' $(if $(DATA),data='$(DATA)') \
	  $(if $(DATA_DIR),paths.data='"$(DATA_DIR)"') $(ARGS)

export: setup ## export a run's encoder, or both its towers: RUN=... FORMAT=timm|hf
	@$(PY) -m src.export run='$(RUN)' $(if $(FORMAT),format=$(FORMAT)) $(ARGS)

config: setup ## every value of an experiment and its file: EXP=mae_vitb [SCALE=tiny], or the differences: VS=dino_vits
	@$(PY) -m src.show_config $(TRAIN) $(if $(VS),vs=$(VS)) $(ARGS)

list: setup ## every experiment: name, family, data, paper
	@$(PY) -m src.listing

pages: setup ## bring docs/methods.md and the README's families up to date
	@$(PY) -m src.methods_page

new: setup ## begin a method of your own from an existing one: METHOD=mine FROM=mae
	@$(PY) -m src.new method='$(METHOD)' from='$(FROM)'

bench: setup ## measure speed and write docs/benchmarks.md
	@$(PY) -m benchmarks $(ARGS)

claim: setup ## check a paper's claim: CLAIM=mae_mask_ratio [DATA=scenes] (without CLAIM: the list)
	@$(PY) -m src.claims $(if $(CLAIM),claim='$(CLAIM)') $(if $(DATA),data=$(DATA)) $(ARGS)

claims: setup ## measure every claim that has not been measured [DATA=scenes], and write docs/claims.md
	@$(PY) -m src.claims all=true $(if $(DATA),data=$(DATA)) $(ARGS)

tensorboard: setup ## dashboards of all runs, on this machine only
	@$(PY) -m tensorboard.main --logdir runs --host 127.0.0.1 --port $(or $(PORT),6006)

test: setup ## every test, offline, on CPU
	@HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= $(PY) -m pytest $(ARGS)

lint: setup ## check style, imports and types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: setup ## fix style and imports
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

clean: ## remove caches and .venv, never runs
	rm -rf .venv cache .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
