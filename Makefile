# make demo   train a Linformer ViT on real photographs of solar cells, here, in minutes
# make test   the test suite
# make test-export   the tests of exported models and of LoRA; installs ONNX Runtime, OpenVINO and PEFT
# make check  formatting, lint, types
# make test-docs   every command and example of README.md and docs/, on tiny data
# make docs   the documentation as a website in site/
# make wheel  wheel and source archive in dist/, and a trial of the wheel in an empty folder
#
# Each sets up first: in the active virtual environment, or else in .venv.

PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
DATA := data/elpv
# Files of tests are shared among processes, in their order.
SHARE := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
RUN := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-export test-docs docs check wheel

demo: $(VENV)/.linvit-demo
	$(BIN)/linvit data elpv $(DATA)
	$(BIN)/python train_imagenet.py $(DATA) --config configs/demo_elpv.yaml --output runs --experiment $(RUN)
	$(BIN)/linvit eval runs/$(RUN) $(DATA)
	@echo "The run lies in runs/$(RUN); always answering \"functional\" would be right on 70.9 % of these images."

test: $(VENV)/.linvit-test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SHARE) --ignore tests/export --ignore tests/docs/test_commands.py

test-export: $(VENV)/.linvit-test $(VENV)/.linvit-export $(VENV)/.linvit-lora
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SHARE) tests/export tests/runtimes tests/examples tests/training/test_lora.py

test-docs: $(VENV)/.linvit-test $(VENV)/.linvit-export $(VENV)/.linvit-lora $(VENV)/.linvit-demo
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SHARE) --dist load tests/docs/test_commands.py

docs: $(VENV)/.linvit-docs
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(VENV)/.linvit-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: | $(BIN)/python
	$(BIN)/python -m pip install --quiet build
	rm -rf build dist
	$(BIN)/python -m build
	PYTHON=$(BIN)/python .ci/try_wheel dist/*.whl

# One stamp per extra; a change of the dependencies installs again.
$(VENV)/.linvit-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
