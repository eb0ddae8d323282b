# Every target sets up what it needs: Python 3.11 and make are enough.
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
OLDEST := .venv-oldest
READER := .venv-reader
WHEELS := .wheels
# Every release of verl whose trainers the hook follows; tests parse them.
VERLS := 0.5.0 0.6.0 0.6.1 0.7.0 0.7.1 0.8.0 0.9.0 0.9.1
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.stamp
# What must be equal with every transformers that is allowed.
FIDELITY := $(addprefix unit/test_,conversion.py config_json.py custom_code.py) \
    $(addprefix integration/test_,export.py base_model.py critic.py lora.py against_shards.py remote_code.py assets.py \
    contradictions.py) $(addprefix upstream/test_,contract.py families.py) adversarial/test_bad_input.py
DEMO := demo_out

.DEFAULT_GOAL := help
.PHONY: help setup wheels lint test test-unit test-full test-matrix docs bench demo clean

help:  ## this list
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP)  ## .venv with torch, verl and this project

# torch first and alone: what verl asks for must not choose another build of it.
$(STAMP) $(OLDEST)/.stamp: pyproject.toml
	test -x $(@D)/bin/pip || $(BASE_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet -e '.[verl,peft,dev]' $(ALSO)
	touch $@

# The oldest that verl 0.9.1 allows; tests/upstream/test_contract.py compares.
$(OLDEST)/.stamp: ALSO = transformers==5.5.3

# What serving engines read exports with; this project is not in it.
$(READER)/.stamp: Makefile
	test -x $(@D)/bin/pip || $(BASE_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet 'transformers==4.57.*' safetensors pillow jinja2
	touch $@

$(WHEELS)/.stamp: Makefile $(STAMP)
	mkdir -p $(@D)
	for v in $(VERLS); do $(BIN)/pip download --quiet --no-deps --dest $(@D) verl==$$v || exit 1; done
	touch $@

wheels: $(WHEELS)/.stamp  ## every release of verl, for the tests that parse them

lint: $(STAMP)  ## ruff: rules and formatting; pyright: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-unit: $(STAMP)  ## parts on their own, without Ray: two minutes at most
	$(BIN)/python -m pytest tests/unit

test: $(STAMP) $(WHEELS)/.stamp  ## what CI runs
	$(BIN)/python -m pytest -m "not full and not matrix"

test-full: $(STAMP) $(WHEELS)/.stamp $(OLDEST)/.stamp $(READER)/.stamp  ## the long proofs too, with the oldest transformers, read by 4.57
	$(BIN)/python -m pytest -m "not matrix"
	$(OLDEST)/bin/python -m pytest $(addprefix tests/,$(FIDELITY))

# Other releases of verl, each with a torch and a transformers of its time; an environment takes about 6 GB.
MATRIX := $(patsubst tests/matrix/requirements/%.txt,.venv-matrix/%/.stamp,$(wildcard tests/matrix/requirements/*.txt))
.venv-matrix/torch-%/.stamp: tests/matrix/requirements/torch-%.txt pyproject.toml
	test -x $(@D)/bin/pip || $(BASE_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r $<
	$(@D)/bin/pip install --quiet --no-deps -e .
	touch $@

.venv-matrix/verl-%/.stamp: $(WHEELS)/.stamp
	$(BIN)/pip install --quiet --no-deps --no-index --find-links $(WHEELS) --target $(@D) --upgrade verl==$*
	touch $@

test-matrix: $(STAMP) $(MATRIX) $(VERLS:%=.venv-matrix/verl-%/.stamp)  ## real trainings by other releases of verl
	$(BIN)/python -m pytest -m matrix tests/matrix

docs: $(STAMP)  ## docs/configuration.md from the schema, the table of releases from the runs of test-matrix
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_support.py

bench: $(STAMP)  ## table of benchmarks
	$(BIN)/python -m tests.benchmarks.bench_export
	$(BIN)/python -m tests.benchmarks.bench_plan
	$(BIN)/python -m tests.benchmarks.bench_registry

demo: $(STAMP)  ## train a tiny model with real GRPO on the CPU, list its versions, ask the best one
	rm -rf $(DEMO)
	PYTHON=$(BIN)/python examples/cpu_grpo/train.sh $(DEMO) trainer.total_training_steps=6 \
	    +autoexport=default autoexport.trigger.every_n_steps=2 \
	    'autoexport.trigger.best={metric:"val-core/*/acc/mean@1",mode:max}'
	$(BIN)/python examples/cpu_grpo/demo.py $(DEMO)/checkpoints/exports

clean:  ## remove everything made here
	rm -rf $(VENV) $(OLDEST) $(READER) $(WHEELS) .venv-matrix $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
