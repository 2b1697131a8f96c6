# Every target makes .venv by itself; the system's Python is only used to create it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What `make gpu` runs on: a machine with a GPU has PyTorch already, and maybe no network to install anything from.
GPU_PYTHON ?= $(PYTHON)
GPU_PATH := build/path

# What executes and proves kernels without a GPU, beside the environment: ttsem asks for Python 3.12, and runs with 3.11.
SANITIZER := build/sanitize
SANITIZERS := ttsem==0.1.0 sentryward==0.1.1

# The versions of Triton whose machine code must fit every chip: `make gates`.
TRITONS := build/tritons/3.6.0 build/tritons/3.8.0 build/tritons/3.9.0

# Tests run in one process a core, each with one thread. `make test JOBS=0` runs them in one process.
JOBS ?= logical
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all test-seeds sanitize sanitize-all gates lint format clean bench gpu gpu-cache gpu-train gpu-path report

## demo: train SAGAN on drawn shapes for two minutes on the CPU; pictures in runs/demo/samples, and a score by class
demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/sagan-fast train --preset demo-32 --data shapes --out runs/demo --device cpu
	$(BIN)/sagan-fast sample runs/demo --out runs/demo/samples/by_class.png --count 80 --grid --seed 1
	$(BIN)/sagan-fast attention runs/demo --out runs/demo/samples/attention.png --class-id 6 --count 3
	@echo "Look at runs/demo/samples/by_class.png (one row a class) and attention.png; curves: $(BIN)/tensorboard --logdir runs/demo"
	$(BIN)/sagan-fast evaluate runs/demo --data shapes --metrics gan-test --count 1000 --device cpu

## test: the tests of a few minutes
test: $(STAMP)
	$(PYTEST) -m "not slow"

## test-all: the slow ones too
test-all: $(STAMP)
	$(PYTEST)

## test-seeds: tests that draw inputs, with several seeds; SEEDS=200 or SEEDS=1,2,3 for these, TESTS=tests/data for a part
SEEDS ?= 5
TESTS ?= tests
test-seeds: $(STAMP)
	$(PYTEST) -m "not slow" --seeds $(SEEDS) $(TESTS)

## sanitize: the kernels' tests, executed on the CPU as the IR that Triton compiles, and faults planted in the kernels
sanitize: WHICH = not slow and not gpu
## sanitize-all: the GPU tests too, at real shapes; an hour on two cores
sanitize-all: WHICH = not slow or gpu
sanitize sanitize-all: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target $(SANITIZER) --no-deps --ignore-requires-python $(SANITIZERS)
	SAGAN_FAST_EVIDENCE=1 PYTHONPATH=$(SANITIZER) $(BIN)/python -m ttsem.sanitize pytest -m "$(WHICH)" tests/kernels

## gates: the launches at all widths, compiled for all chips by each Triton; hours, and what is recorded is not done again.
## GATES="--dtype bf16 --arch 86" for a part. The newest disassembler reads them all: that of 3.6 does not know 12.1
gates: $(TRITONS:%=%/.installed)
	failed=0; export TRITON_NVDISASM_PATH=$$($(BIN)/python -c "import triton; print(triton.knobs.nvidia.nvdisasm.path)"); \
	for folder in $(TRITONS); do \
		PYTHONPATH=$(CURDIR)/$$folder $(BIN)/python tests/evidence.py compile $(GATES) || failed=1; done; exit $$failed

build/tritons/%/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(@D) triton==$*
	touch $@

## lint: ruff and mypy
lint: $(STAMP)
	mkdir -p build/typings/sagan_fast && ln -sfn ../../../kernels build/typings/sagan_fast/kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: what lint asks for, done
format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "sagan_fast needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

## bench: CPU benchmarks and the kernel report, then the tables; minutes on any machine
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --device cpu --minutes 4.1
	$(BIN)/python -m benchmarks.kernel_report --arch 90 --dtype bf16 --only 64x64
	$(BIN)/python -m benchmarks.report

## gpu: gate, GPU tests, benchmarks on one NVIDIA GPU, under nine minutes; GPU_ARGS="--only attention" for a part
gpu: gpu-path
	PYTHONSAFEPATH=1 PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

## gpu-cache: compile the kernels for `make gpu` without a GPU, into build/gpu-cache.tar.xz; see benchmarks/gpu_cache.py
gpu-cache: gpu-path
	PYTHONSAFEPATH=1 PYTHONPATH=$(GPU_PATH)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m benchmarks.gpu_cache $(GPU_ARGS)

## gpu-train: eager against our kernels on real data, minutes a call, resumable; DATA="--data cifar-32=folder:PATH"
gpu-train: gpu-path
	PYTHONSAFEPATH=1 PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu_train $(DATA) $(GPU_ARGS)

## gpu-path: the package and the benchmarks as one folder of links, for a Python that nothing is installed into
gpu-path:
	rm -rf $(GPU_PATH) && mkdir -p $(GPU_PATH)/sagan_fast
	ln -s $(CURDIR)/benchmarks $(GPU_PATH)/benchmarks
	ln -s $(CURDIR)/sagan_fast/* $(GPU_PATH)/sagan_fast/
	ln -s $(CURDIR)/kernels $(GPU_PATH)/sagan_fast/kernels

## report: docs/benchmarks.md and the README's tables from the committed records
report: $(STAMP)
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
