# make demo   the whole pipeline on the embedded data and the embedded tiny model, through Prefect
# make test   the test suite
# make check  what CI runs: lint, types, tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# One thread a process: two OpenMP threads on a busy machine can be ten times slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-deployments test-docker lint types check install bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml docker/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint docker/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint docker/constraints.txt --editable ".[dev,deploy]"
	@touch $@

demo: install
	test -d .loraline/demo-images || $(BIN)/python examples/demo/make_dataset.py .loraline/demo-images
	$(BIN)/loraline run --config examples/demo/config.yaml

# Three processes on two cores: the tests with Prefect's server wait as much as they work. Whatever cannot be had on this
# machine (Ceph's packages) is skipped with its reason.
test: install
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not docker"

# Of these, the ones with Prefect's server, real workers and a process for each stage.
test-deployments: install
	$(BIN)/python -m pytest -m deployments

# Builds the images and runs each stage in its own container; needs a Docker engine, or Debian's packages for one.
DOCKER_TESTS ?= tests/docker
test-docker: install
	$(BIN)/python -m pytest -m "docker and not ceph" $(DOCKER_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf .loraline build *.egg-info
