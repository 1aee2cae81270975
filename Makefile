# Every target sets itself up: a virtual environment for this Python in .venv/, from constraints.txt.
# The newest supported Python that runs, for it gets the newest JAX; a shim of pyenv may exist, and fail.
ifndef PYTHON
RUNS = $(shell $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(1))
PYTHON := $(or $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(call RUNS,$(name)))),python3)
endif
EXTRAS ?= train,serve,test,dev
VENV := .venv/$(notdir $(PYTHON))
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(EXTRAS)
TESTS ?= -m "not slow and not ray"

.PHONY: help setup quickstart serve test lint bench streams docs stubs constraints clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: $(STAMP)  ## Install into .venv/ (PYTHON=python3.12 and EXTRAS=... to choose)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "GATI-JAX needs Python 3.11 or newer; $(PYTHON) is older (make ... PYTHON=python3.12)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

quickstart: $(STAMP)  ## Train a small network on digits, cache it, certify it, evaluate it: three minutes
	$(PY) -m train.base --config configs/digits.toml --out runs/digits/base
	$(PY) -m train.caches --config configs/digits.toml --out runs/digits/caches --ledger runs/digits/looks.json
	$(PY) -m train.evaluate --bundle runs/digits/caches/bundle --out runs/digits/eval --ledger runs/digits/looks.json
	@echo "Look at runs/digits/eval/report.html. Then: make serve, and http://127.0.0.1:8000/ shows the server at work."
	@echo "Your own network: docs/how-to/own-network.md, or: gati-jax init --help"

serve: $(STAMP)  ## Serve the quickstart's bundle (BUNDLE=runs/r56/bundle ARGS='--http-port 8080')
	$(PY) -m serve --bundle $(or $(BUNDLE),runs/digits/caches/bundle) $(ARGS)

test: $(STAMP)  ## Run the tests (TESTS='-m slow' for those on real CIFAR-10)
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(STAMP)  ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

bench:  ## Time a bundle beside other runtimes (BUNDLE=runs/r56/bundle ARGS='--rounds 9')
	$(MAKE) --no-print-directory setup EXTRAS=train,torch,bench
	$(PY) -m benchmarks.compare --bundle $(or $(BUNDLE),runs/digits/caches/bundle) $(ARGS)

streams:  ## Certify CREPE on recordings (RECORDINGS='DIR ...' MUSIC=DIR ARGS='--answers semitones')
	$(MAKE) --no-print-directory setup EXTRAS=train,bench
	$(PY) -m benchmarks.streams --recordings $(RECORDINGS) $(if $(MUSIC),--music $(MUSIC)) $(ARGS)

docs:  ## Build the documentation into site/; needs no network, and fails on a dead link
	$(MAKE) --no-print-directory setup EXTRAS=train,serve,docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# A process may also import tritonclient's messages, which bear the same names: ours stay out of the shared pool.
stubs: $(STAMP)  ## Compile serve/protocol/*.proto
	cd serve/protocol && $(abspath $(PY)) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. *.proto
	sed -i 's/_descriptor_pool.Default()/_descriptor_pool.DescriptorPool()/' serve/protocol/*_pb2.py

constraints: $(STAMP)  ## Resolve all extras together anew
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --upgrade -o constraints.txt

clean:  ## Remove environments, results and the built documentation
	rm -rf .venv runs site
