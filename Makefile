# make          the same as make help: what can be made
# make demo     train, quantize and score a tiny model on the CPU, and read what it writes
# make score    score the published tiny artifact and have it write: no training, under a minute once .venv is there
# make check    what a new machine has to be able to do, in short: demo, score, audit, some tests
# make test     run the tests
# make lint     check the style
# make clean    remove what these made
#
# make demo PYTHON=python3.12 TORCH="torch==2.11.0"    choose the Python and the torch of .venv
# make demo MAX_WALLCLOCK_SECONDS=20                   settings of train_gpt.py pass through
# make demo SAMPLE_PROMPT="In the morning"             what it is to continue; so for make score
# make check CHECK=all                                 the whole demo, audit and tests
#
# A target that fails ends make with status 2 and says which command failed.

PYTHON ?= python3
TORCH ?=
DEVICE ?= cpu
VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
SAMPLE := data/sample/sample_val_000000.bin
# Threads sleep while they wait for each other; on a machine that is shared, spinning makes a run
# several times slower.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

.PHONY: help demo score check test lint clean FORCE

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: .venv/.run $(SAMPLE)
	rm -f logs/demo.*
	SAMPLE_PROMPT="$${SAMPLE_PROMPT-The function returns}" \
	LOG_DIR=logs RUN_ID=demo PRESET=tiny DEVICE=$(DEVICE) $(VENV_PYTHON) train_gpt.py
	@$(VENV_PYTHON) -m tools.summary logs/demo.jsonl

score: .venv/.run
	SAMPLE_PROMPT="$${SAMPLE_PROMPT-The function returns}" EVAL_ONLY=1 LOG_DIR=logs RUN_ID=tiny \
	DEVICE=$(DEVICE) ARTIFACT=data/tiny/tiny.int6.lzma $(VENV_PYTHON) train_gpt.py

check: .venv/.dev
	CHECK=$${CHECK:-quick} PYTHON=$(VENV_PYTHON) tools/container_check.sh

test: .venv/.dev
	$(VENV_PYTHON) -m pytest -n 2 --dist loadfile

lint: .venv/.dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m tools.density

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis data/sample logs/demo.* logs/tiny.eval.*
	find . -name __pycache__ -prune -exec rm -rf {} +

$(SAMPLE): | .venv/.run
	$(VENV_PYTHON) data/prepare.py sample

# Each stamp says that a layer of .venv is complete: torch, what a run needs, what the tests need,
# which is asked for together with what a run needs: pip would install a numpy twice.
.venv/.torch: $(if $(TORCH),FORCE)
	TORCH="$(TORCH)" $(PYTHON) -m tools.make_venv
	@touch $@

.venv/.run: .venv/.torch requirements.txt
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

.venv/.dev: .venv/.torch requirements.txt requirements-dev.txt
	$(PIP_INSTALL) -r requirements.txt -r requirements-dev.txt
	@touch .venv/.run $@
