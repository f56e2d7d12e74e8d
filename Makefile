# Every target works first thing in a fresh clone: `setup` makes .venv, the others stand on it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PROFILE ?= cpu
# An environment in which torch may be a CUDA build already: make setup EXTRAS=dev PYTHON=/path/to/python
EXTRAS ?= dev
FAST := not ray and not browser and not slow and not gpu

.PHONY: setup demo up test check format bench compile-kernels train-tiny eval-tiny text-encoder models label-studio clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/gesso demo

up: setup
	$(BIN)/gesso up

test: setup
	$(BIN)/pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/hadolint Dockerfile
	$(BIN)/pytest -q -n 2 --dist loadfile -m "$(FAST)"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every Triton kernel for every architecture, without a GPU: registers, spills, shared memory.
compile-kernels: setup
	$(BIN)/python -m gesso_kernels.compile_gate

bench: setup
	$(BIN)/python bench/dc_ae.py
	$(BIN)/python bench/sana.py
	$(BIN)/python bench/fabric.py
	$(BIN)/python bench/embedded.py
	$(BIN)/python bench/quantize_layers.py
	$(BIN)/python bench/quantized_cpu.py
	$(BIN)/python bench/autoregressive.py
	$(BIN)/python bench/best_of_n.py
	$(BIN)/python bench/annotation.py

train-tiny: setup
	$(BIN)/python -m gesso_core.train all --profile $(PROFILE)

eval-tiny: setup
	$(BIN)/python -m gesso_core.evaluate

text-encoder: setup
	$(BIN)/python -m gesso_core.text.build_smollm2

# The default segmenter of the annotation service (45 MB), into ~/.cache/gesso/models.
models: setup
	$(BIN)/python -m gesso_core.annotate.fetch

# A real Label Studio (1 GB, no part of gesso) for the tests that talk to it, in an environment of its own.
label-studio: LABEL_STUDIO = $(HOME)/.cache/gesso/label-studio
label-studio: export LABEL_STUDIO_BASE_DATA_DIR = $(LABEL_STUDIO)/empty
label-studio:
	@test -x $(LABEL_STUDIO)/bin/python || $(PYTHON) -m venv $(LABEL_STUDIO)
	$(LABEL_STUDIO)/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement tests/helpers/label_studio/requirements.txt
	@echo "making its data base, which takes a minute"
	@COLLECT_ANALYTICS=false LATEST_VERSION_CHECK=false SENTRY_DSN= $(LABEL_STUDIO)/bin/label-studio init empty --quiet \
		>$(LABEL_STUDIO)/init.log 2>&1 || (cat $(LABEL_STUDIO)/init.log; false)

clean:
	rm -rf .venv runs outputs .mypy_cache .pytest_cache .ruff_cache
