PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu
EXTRAS := test,demo,lint
# The demo alone needs neither Triton nor TRL nor linters, more than half of all that is installed.
DEMO_READY := $(VENV)/installed$(if $(wildcard $(VENV)/installed),,-for-demo)
CXX_SOURCES := $(wildcard $(foreach ext,cpp h cu cuh,csrc/*.$(ext) csrc/*/*.$(ext)))

.PHONY: help install demo test sanitize bench bench-gpu gpu-static lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     fine-tune a small chat model with and without the guard, and compare (QUICK=1: fewer prompts)"
	@echo "make test     the test suite (JOBS=n processes, default $(JOBS); ARGS='-k name' goes to pytest)"
	@echo "make sanitize the tests of the C++ kernels under AddressSanitizer and UBSan, for every instruction set"
	@echo "make bench    speed against plain PyTorch and PEFT (ARGS='--help' lists the options)"
	@echo "make bench-gpu   the same on a CUDA device"
	@echo "make gpu-static  compile the Triton kernels for every chip, without one, and write what came out"
	@echo "make lint     ruff, mypy and clang-format; make format applies what can be applied"
	@echo "make install  only create $(VENV), which the others do when needed (TORCH_INDEX=url: take torch from there)"
	@echo "make clean    remove $(VENV), caches and build products"

# PyPI's torch for Linux is a CUDA build of several GB. Without an NVIDIA driver, look for the CPU build on PyTorch's
# own index too, provided that it answers; there a local version (2.x.y+cpu) wins over PyPI's 2.x.y.
$(VENV)/installed $(VENV)/installed-for-demo: pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
	@$(PYTHON) -m venv $(VENV)
	@index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	    $(BIN)/python -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="$(CPU_INDEX)"; fi; \
	echo "Installing into $(VENV), once; this takes a minute or two"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile $${index:+--extra-index-url "$$index"} \
	    -c constraints.txt -e ".[$(if $(filter %-for-demo,$@),demo,$(EXTRAS))]"
	@$(BIN)/guardspace env | grep -E '^(cpu extension|cuda kernels)  '
	@touch $@

install: $(VENV)/installed

demo: $(DEMO_READY)
	$(BIN)/python -m guardspace_kernels demo $(if $(QUICK),--quick) $(ARGS)

# The tests are thousands of small products, so processes of one thread each beat one process with many threads.
test: $(VENV)/installed
	$(if $(filter-out 0,$(JOBS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

sanitize: $(VENV)/installed
	$(BIN)/python python_tests/sanitize.py -n $(JOBS) --dist worksteal $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.run --device cuda $(ARGS)

gpu-static: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_static $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f guardspace_kernels/*.so guardspace_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
