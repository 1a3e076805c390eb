# Thin fronts of the `duet` command. `make` alone lists them.
VENV ?= .venv
CONFIG ?= configs/lab.yaml
ARGS ?=
TEST_PROCESSES ?= 3
LAUNCHER ?= local
CLUSTER ?= /tmp/duet-slurm
BIN := $(VENV)/bin
STAMP := $(VENV)/.duet-setup
DEV := $(VENV)/.duet-setup-dev

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-images test-slurm soak-store lint lab-models audit-prefix teacher-logits distill evaluate compare run slurm-cluster slurm-cluster-down bench-store bench-student bench-teacher bench-teacher-engine bench-evaluate bench-exchange gpu-check dist docs docs-metrics docs-families docs-reference clean-venv demo-smollm2 smollm2-lab

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## make .venv and install Duet and what a run needs; picks GPU or CPU packages

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt scripts/setup.sh
	@VENV=$(VENV) sh scripts/setup.sh

$(DEV): pyproject.toml constraints.txt constraints-cpu.txt scripts/setup.sh
	@VENV=$(VENV) EXTRAS=dev sh scripts/setup.sh

# The second run's relearning is cut short; `duet run --config configs/lab_deep.yaml` goes on from there.
demo: $(STAMP) ## three people forgotten, by plain DUET and by a hardened student: reports in runs/lab and runs/lab_deep
	@$(BIN)/duet run --config configs/lab.yaml
	@$(BIN)/duet run --config configs/lab_deep.yaml --jobs 2 \
	    --set 'evaluate.relearn={pairs: [5], draws: 1, benign: 0, lrs: [1.0e-3], steps: [1, 2, 5, 10]}'

# SmolLM2's GGUF file, and what reads it.
smollm2 = { $(BIN)/python -c 'import gguf' 2>/dev/null || VENV=$(VENV) EXTRAS=gguf sh scripts/setup.sh; } && \
    $(BIN)/python lab/fetch_smollm2.py

demo-smollm2: $(STAMP) ## a pretrained chat model: audit and run, report in runs/smollm2
	@$(smollm2)
	-@$(BIN)/duet audit-prefix --config configs/smollm2.yaml # of eight rows a set, one wrong answer fails a prefix
	@$(BIN)/duet run --config configs/smollm2.yaml

test: $(DEV) ## all tests
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

# Without vLLM, browser, Slurm, and whatever starts many processes.
QUICK := tests/test_house.py tests/test_english.py tests/test_docs.py tests/cache/test_codec.py tests/cache/test_golden.py \
    tests/cache/test_leases.py tests/stages/metrics tests/stages/models tests/stages/questions/test_prompts.py \
    tests/stages/student/test_losses.py tests/stages/student/test_passes.py tests/stages/audit tests/pipeline/config \
    tests/pipeline/cli/test_mistakes.py tests/pipeline/pages/test_report.py

test-quick: $(DEV) ## tests for the inner loop, under two minutes
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(QUICK) $(ARGS)

test-images: $(DEV) ## build the images with Docker, Podman or Apptainer and run them; gigabytes
	@DUET_TEST_IMAGES=1 $(BIN)/python -m pytest tests/test_docs_containers.py -rs $(ARGS)

soak-store: $(DEV) ## 1,000 random bit flips in each kind of store, and 1,000 writers of one store
	@DUET_FLIPS=1000 DUET_TASKS=1000 $(BIN)/python -m pytest tests/cache/test_damage.py tests/cache/test_many_writers.py \
	    -k "random_bit_flips or tasks_of_an_array" --durations=6 $(ARGS)

lint: $(DEV) ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python scripts/link_names.py
	@$(BIN)/pyright --pythonpath $(BIN)/python

lab-models: $(STAMP) ## train the lab's models again
	@$(BIN)/python lab/train_models.py $(ARGS)

smollm2-lab: $(STAMP) ## teach SmolLM2 the lab's people and obedience to a prefix again
	@$(smollm2)
	@$(BIN)/python lab/teach_smollm2.py $(ARGS)

audit-prefix: $(STAMP) ## what prefixes do, before training; ARGS="--prefix TEXT --search N"
	@$(BIN)/duet audit-prefix --config $(CONFIG) $(ARGS)

# LAUNCHER=slurm submits a stage, or a run, as jobs.
stage = $(BIN)/duet $(if $(filter slurm,$(LAUNCHER)),submit --stage $@,$@)

teacher-logits: $(STAMP) ## stage one; CONFIG=file, ARGS="--set key=value", LAUNCHER=slurm
	@$(stage) --config $(CONFIG) $(ARGS)

distill: $(STAMP) ## stage two
	@$(stage) --config $(CONFIG) $(ARGS)

evaluate: $(STAMP) ## stage three
	@$(stage) --config $(CONFIG) $(ARGS)

compare: $(STAMP) ## DUET against other unlearning methods; minutes on the lab, longer on TOFU
	@$(BIN)/duet compare --config $(CONFIG) $(ARGS)

run: $(STAMP) ## all three stages
	@$(BIN)/duet $(if $(filter slurm,$(LAUNCHER)),submit,run) --config $(CONFIG) $(ARGS)

slurm-cluster: ## a two-node Slurm on this machine, to try LAUNCHER=slurm on (root, Debian); says what to export
	@sh scripts/install_slurm.sh
	@python3 scripts/slurm_cluster.py up $(CLUSTER)

slurm-cluster-down: ## end it
	@python3 scripts/slurm_cluster.py down $(CLUSTER)

test-slurm: $(DEV) ## the tests on a real Slurm, which they start and end (root, Debian)
	@sh scripts/install_slurm.sh
	@$(BIN)/python -m pytest tests/pipeline/run/test_slurm_cluster.py $(ARGS)

docs: $(DEV) ## the documentation as a site in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-metrics: $(DEV) ## write docs/metrics.md from the code's docstrings
	@$(BIN)/python scripts/docs_pages.py metrics

docs-families: $(DEV) ## write docs/families.md from real tokenizers and chat templates, where they are
	@PYTHONPATH=tests:tests/helpers $(BIN)/python tests/helpers/families.py

docs-reference: $(DEV) ## write docs/reference from the code's commands and settings
	@$(BIN)/python scripts/docs_pages.py reference

clean-venv: ## remove .venv
	@rm -rf $(VENV)

bench-store: $(DEV) ## what a store costs: bytes, rates, memory; ARGS=--json
	@$(BIN)/python benchmarks/store.py $(ARGS)

bench-student: $(DEV) ## what a training step costs: head, whole step, waiting; ARGS=--json
	@$(BIN)/python benchmarks/student.py $(ARGS)

bench-exchange: $(DEV) ## what it costs to export and import a store; ARGS=--json
	@$(BIN)/python benchmarks/exchange.py $(ARGS)

gpu-check: $(STAMP) ## what only a GPU can show, in nine minutes; ARGS="--device cpu --tiny" runs anywhere
	@PYTHON=$(BIN)/python sh scripts/gpu_check.sh $(ARGS)

dist: $(DEV) ## wheel and source archive in dist/, checked as an index would
	@rm -rf dist && mkdir -p build && $(BIN)/python -m build --no-isolation . >build/dist.log || { tail build/dist.log; exit 1; }
	@$(BIN)/python -m twine check --strict dist/*

bench-teacher: $(DEV) ## what stage one costs beside plain generation; ARGS=--json
	@$(BIN)/python benchmarks/teacher.py $(ARGS)

bench-teacher-engine: $(DEV) ## how fast stage one's rows come without vLLM, beside the engine as it was; ARGS=--json
	@$(BIN)/python benchmarks/teacher_engine.py $(ARGS)

bench-evaluate: $(DEV) ## how fast stage three's answers come, beside transformers.generate; ARGS=--json
	@$(BIN)/python benchmarks/evaluate.py $(ARGS)
