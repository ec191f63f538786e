# qwen-fusion: everything a newcomer runs. `make help` lists it.
# Overrides of the recipe pass through: make demo SET="--set routing.top_k=2"
# Needs python3 (3.11+) with venv, and a Python package index; a model hub is used where there is one, never required.

VENV    := .venv
BIN     := $(VENV)/bin
PYTHON  ?= python3
# uv resolves and installs the set in seconds; where it is not on the machine it goes into the environment first
UV      := $(shell command -v uv 2>/dev/null || echo $(BIN)/uv)
GPU     := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# a CPU build of torch: from a folder of wheels where PIP_FIND_LINKS names one, otherwise from PyTorch's own index
LINKS   := $(foreach place,$(PIP_FIND_LINKS),--find-links "$(place)")
WHEELS  := $(if $(LINKS),$(LINKS),--torch-backend cpu)
# where Python is told to keep no bytecode, every command would compile torch and transformers anew: 8 seconds each
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
ifeq ($(GPU),yes)
INSTALL := $(UV) pip install -q $(COMPILE) --python $(BIN)/python -c constraints.txt $(LINKS) --torch-backend auto -e ".[gpu,registry-weights,dev]"
else
INSTALL := $(UV) pip install -q $(COMPILE) --python $(BIN)/python -c constraints.txt --override constraints.cpu-overrides.txt $(WHEELS) \
           -e ".[cpu,registry-weights,dev]"
endif

.PHONY: help setup demo demo-real test check format bench bench-fusion bench-gates bench-guard bench-traffic soak bench-runs constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## install everything into .venv (vLLM's CUDA build where there is a GPU)

$(VENV)/.installed: pyproject.toml constraints.txt constraints.cpu-overrides.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v $(UV) >/dev/null || $(BIN)/python -m pip install -q uv==0.13.9
	$(INSTALL)
	touch $@

demo: setup  ## small experts to one served MoE, end to end, on any machine (runs/demo/report.md)
	$(BIN)/qwen-fusion run configs/demo.yaml $(SET)

demo-real: setup  ## the same road on real Qwen2.5-Coder-0.5B weights (20 to 40 minutes on 2 cores)
	$(BIN)/qwen-fusion run configs/qwen2.5-0.5b-two-experts.yaml $(SET)

test: setup  ## all tests
	$(BIN)/python -m pytest

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-fusion bench-gates bench-guard bench-traffic  ## all benchmarks

bench-gates: setup  ## gate training against a plain forward pass and the peers' way, on the demo's model (after make demo)
	QWEN_FUSION_QUIET=1 $(BIN)/python -m gate_training.bench configs/demo.yaml

bench-guard: setup  ## what the guard costs (before a stub, beside LiteLLM) and gives (a real vLLM): BENCH="--bfcl FOLDER"
	$(BIN)/python -m serving.bench configs/qwen2.5-0.5b-two-experts.yaml $(BENCH)

bench-fusion: setup  ## a merge beside mergekit-moe and cp at three sizes, a plan's time (70 GB): BENCH="--sizes demo"
	QWEN_FUSION_QUIET=1 $(BIN)/python -m fusion.bench $(BENCH)

bench-traffic: setup  ## mixed traffic on the fused model, on its experts side by side, on LoRA adapters (after make demo)
	QWEN_FUSION_QUIET=1 $(BIN)/python -m serving.bench.traffic configs/demo.yaml $(BENCH)

soak: setup  ## ten minutes of requests through the guard while vLLM is killed behind it (after make demo)
	$(BIN)/python -m serving.bench.soak configs/demo.yaml $(BENCH)

bench-runs: setup  ## the runs whose quality bench-gates quotes, what is there already skipped (about 3 hours on 2 cores)
	$(BIN)/python -m gate_training.bench configs/demo.yaml runs

constraints: setup  ## resolve constraints.txt anew, one set of versions for CPU and GPU
	sh .ci/constraints.sh $(UV)

clean:  ## remove what runs and tests left behind (not .venv)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
