# Two commands: `make demo` takes the bundled model through the whole way, `make test` checks the
# house. Both set up .venv first. On a machine with a GPU, name its torch build, for example
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python

.PHONY: demo test bench lint build setup clean

demo: build
	$(RUN) -m vitapack demo --out demo-out

test: build lint
	$(RUN) -m pytest -q

# Micro-benchmarks, compared with the last saved run on this processor.
bench: build
	$(RUN) -m benchmarks.micro

# mypy does not follow setuptools' package mapping: it is shown the installed layout through links.
lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	mkdir -p build/types/vitapack
	ln -sf $(CURDIR)/vitapack/*.py build/types/vitapack/
	ln -sfn $(CURDIR)/vitapack/commands $(CURDIR)/kernels $(CURDIR)/runtime $(CURDIR)/compressor \
		build/types/vitapack/
	MYPYPATH=build/types $(RUN) -m mypy -p vitapack

# The compiled parts, through ninja: only what changed.
build: setup
	$(RUN) csrc/build.py

setup: $(VENV)/.ready

# torch first and pinned: left to itself pip may choose a build of several gigabytes.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q $(TORCH)
	VITAPACK_COMPILE=0 $(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out vitapack/_C*.so vitapack/libvitapack_cuda.so
