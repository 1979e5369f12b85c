# Every command of Pretext. `make help` lists them; each target sets up .venv first if it is missing or stale.
.DEFAULT_GOAL := help
SHELL := /bin/sh
export PYTHONUNBUFFERED := 1
PY := .venv/bin/python

# Values are passed on as they are typed, whatever they hold: $(value …) does not expand a $, `quoted` writes a value as one
# word of the shell, `string` as a string of Hydra's grammar, in which quotes and the beginning of a ${…} are escaped.
quoted = '$(subst ','\'',$(1))'
string = "$(subst $${,\$${,$(subst ",\",$(1)))"
# $(call given,VARIABLE,key) is key=<value> and $(call typed,VARIABLE,key) key="<value>", nothing without a value
given  = $(if $(value $(1)),$(call quoted,$(2)=$(value $(1))))
typed  = $(if $(value $(1)),$(call quoted,$(2)=$(call string,$(value $(1)))))
# NAME counts only if it is typed: some systems keep the machine's name in the environment
name   = $(if $(filter command,$(origin NAME)),$(call typed,NAME,run.name))

# variables of the command line become overrides; ARGS="key=value ..." is passed on unchanged
TRAIN = $(call given,EXP,experiment) $(call given,SCALE,scale) $(call given,DATA,data) \
        $(call typed,DATA_DIR,paths.data) $(call typed,CKPT,checkpoint) $(name) \
        $(call given,SEED,seed) $(call given,DEVICES,trainer.devices)

.PHONY: help setup train submit resume evaluate gauntlet export config list pages new bench claim claims tensorboard test fuzz lint format clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make train EXP=mae_vitb [SCALE=paper|smoke|tiny] [DATA=emoji] [DATA_DIR=...] [CKPT=...]"
	@echo "             [NAME=...] [SEED=0] [DEVICES=2] [ARGS=\"data.batch_size=64 trainer.max_epochs=5\"]"

# Every recipe replaces its shell by the program (exec), so that a signal to make reaches the program.
setup: ## make .venv (the other targets do it themselves)
	@exec tools/setup.sh

train: setup ## train an experiment: EXP=mae_vitb (without EXP: the list)
	@exec $(PY) -m src.train $(TRAIN) $(ARGS)

submit: setup ## train under SLURM, as EXP=... but with NODES=2 DEVICES=8 ARGS="cluster.slurm_partition=gpu"
	@exec $(PY) -m src.submit $(TRAIN) $(call given,NODES,trainer.num_nodes) $(ARGS)

resume: setup ## continue a run, to the same bits: RUN=runs/<experiment>/<name>
	@exec $(PY) -m src.resume $(call quoted,run=$(value RUN)) $(call given,DEVICES,trainer.devices) $(ARGS)

evaluate: setup ## evaluate a run's encoder: RUN=... EVAL=knn,linear,finetune [DATA=emoji]
	@exec $(PY) -m src.evaluate $(call quoted,run=$(value RUN)) $(call given,EVAL,eval) $(call given,DATA,data) \
	  $(call typed,DATA_DIR,paths.data) $(ARGS)

gauntlet: setup ## rank several runs' encoders by many tasks: RUN="runs/a/x runs/b/y" [DATA=emoji]
	@exec $(PY) -m src.gauntlet $(call quoted,run=$(value RUN)) $(call given,DATA,data) \
	  $(call typed,DATA_DIR,paths.data) $(ARGS)

export: setup ## export a run's encoder, or both its towers: RUN=... FORMAT=timm|hf
	@exec $(PY) -m src.export $(call quoted,run=$(value RUN)) $(call given,FORMAT,format) $(ARGS)

config: setup ## every value of an experiment and its file: EXP=mae_vitb [SCALE=tiny], or the differences: VS=dino_vits
	@exec $(PY) -m src.show_config $(TRAIN) $(call given,VS,vs) $(ARGS)

list: setup ## every experiment: name, family, data, paper
	@exec $(PY) -m src.listing

pages: setup ## bring docs/methods.md and the README's families up to date
	@exec $(PY) -m src.methods_page

new: setup ## begin a method of your own from an existing one: METHOD=mine FROM=mae
	@exec $(PY) -m src.new $(call quoted,method=$(value METHOD)) $(call quoted,from=$(value FROM))

bench: setup ## measure speed and write docs/benchmarks.md
	@exec $(PY) -m benchmarks $(ARGS)

claim: setup ## check a paper's claim: CLAIM=mae_mask_ratio [DATA=scenes] (without CLAIM: the list)
	@exec $(PY) -m src.claims $(call given,CLAIM,claim) $(call given,DATA,data) $(ARGS)

claims: setup ## measure every claim that has not been measured [DATA=scenes], and write docs/claims.md
	@exec $(PY) -m src.claims all=true $(call given,DATA,data) $(ARGS)

tensorboard: setup ## dashboards of all runs, on this machine only
	@exec $(PY) -m tensorboard.main --logdir runs --host 127.0.0.1 --port $(call quoted,$(or $(value PORT),6006))

test: setup ## every test, offline, on CPU
	@exec $(PY) -m pytest $(ARGS)

fuzz: setup ## try many wrong values, odd paths and broken files, others each time: [CASES=1000]
	@exec env FUZZ=$(or $(CASES),300) FUZZ_SEED=$$(date +%s) $(PY) -m pytest tests/fuzz $(ARGS)

lint: setup ## check style, imports and types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && exec $(PY) -m mypy

format: setup ## fix style and imports
	@$(PY) -m ruff check --fix . && exec $(PY) -m ruff format .

clean: ## remove caches and .venv, never runs
	rm -rf .venv cache .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
