# Thin fronts of the `duet` command. `make` alone lists them.
VENV ?= .venv
CONFIG ?= configs/lab.yaml
ARGS ?=
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.duet-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-images lint lab-models audit-prefix teacher-logits distill evaluate compare run bench-store bench-student bench-teacher docs docs-metrics docs-reference clean-venv

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## make .venv and install Duet; picks GPU or CPU packages

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt scripts/setup.sh
	@VENV=$(VENV) sh scripts/setup.sh

demo: $(STAMP) ## the whole lab experiment: three people forgotten, report in runs/lab
	@$(BIN)/duet run --config configs/lab.yaml

test: $(STAMP) ## all tests
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-images: $(STAMP) ## build the images with Docker, Podman or Apptainer and run them; gigabytes
	@DUET_TEST_IMAGES=1 $(BIN)/python -m pytest tests/test_docs_containers.py -rs $(ARGS)

lint: $(STAMP) ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

lab-models: $(STAMP) ## train the lab's two base models anew
	@$(BIN)/python lab/train_models.py $(ARGS)

audit-prefix: $(STAMP) ## what prefixes do, before training; ARGS="--prefix TEXT --search N"
	@$(BIN)/duet audit-prefix --config $(CONFIG) $(ARGS)

teacher-logits: $(STAMP) ## stage one; CONFIG=file, ARGS="--set key=value"
	@$(BIN)/duet teacher-logits --config $(CONFIG) $(ARGS)

distill: $(STAMP) ## stage two
	@$(BIN)/duet distill --config $(CONFIG) $(ARGS)

evaluate: $(STAMP) ## stage three
	@$(BIN)/duet evaluate --config $(CONFIG) $(ARGS)

compare: $(STAMP) ## DUET against other unlearning methods; minutes on the lab, under half an hour on TOFU
	@$(BIN)/duet compare --config $(CONFIG) $(ARGS)

run: $(STAMP) ## all three stages
	@$(BIN)/duet run --config $(CONFIG) $(ARGS)

docs: $(STAMP) ## the documentation as a site in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-metrics: $(STAMP) ## write docs/metrics.md from the code's docstrings
	@$(BIN)/python -m pipeline.metrics_page

docs-reference: $(STAMP) ## write docs/reference from the code's commands and settings
	@$(BIN)/python -m pipeline.reference_pages

clean-venv: ## remove .venv
	@rm -rf $(VENV)

bench-store: $(STAMP) ## what a store costs: bytes, rates, memory; ARGS=--json
	@$(BIN)/python benchmarks/store.py $(ARGS)

bench-student: $(STAMP) ## what a training step costs: head, whole step, waiting; ARGS=--json
	@$(BIN)/python benchmarks/student.py $(ARGS)

bench-teacher: $(STAMP) ## what stage one costs beside plain generation; ARGS=--json
	@$(BIN)/python benchmarks/teacher.py $(ARGS)
