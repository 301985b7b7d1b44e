# Each target sets up .venv by itself. PYTHON chooses the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves 4.9 GB: PyPI's torch for Linux always brings CUDA.
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
KILLS ?= 20
HITS ?= 100
SEED ?= 0
MODULE ?=
SAMPLE ?= 100
FUZZ_SECONDS ?= 300
TEST_PROCESSES ?= 2

.PHONY: help demo test coverage test-slow lint types contracts docs docs-serve chaos mutants fuzz audit sbom peers bench bench-full clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed ## every stage on a generated shop; outputs in runs/demo
	$(BIN)/qbert-ray demo runs/demo
	@echo "The command is in $(BIN): run 'source $(BIN)/activate', then qbert-ray works by name."

test: .venv/.installed ## the tests, and that they cover enough of the package; QBERT_REAL_DATA=<folder> adds those on real data
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --durations 15 --cov --cov-report=

coverage: .venv/.installed ## lines and branches that the last make test left out
	$(BIN)/coverage report --show-missing --sort=miss --fail-under=0

test-slow: .venv/.installed ## also the tests that take minutes
	$(BIN)/python -m pytest -m "not gpu" --timeout 1800

lint: .venv/.linters ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.linters ## types: mypy
	$(BIN)/mypy qbert_ray

contracts: .venv/.linters ## which folder may import which: import-linter
	$(BIN)/lint-imports --no-logo

docs: .venv/.installed ## the documentation site, in site/; warnings are errors, and no network is needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

docs-serve: .venv/.installed ## the same on http://127.0.0.1:8000, rebuilt when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

chaos: .venv/.installed ## faults in random stages, then over whole runs; KILLS=20 HITS=100 SEED=0
	$(BIN)/python -m tests.chaos.kills --kills $(KILLS) --seed $(SEED) --out runs/chaos.md
	$(BIN)/python -m tests.chaos.storm --hits $(HITS) --seed $(SEED) --out runs/storm.md

mutants: .venv/.linters ## share of small changes that the tests notice; MODULE=qbert_ray/metrics.py SAMPLE=100 SEED=0
	$(BIN)/python -m tests.mutants $(MODULE) --sample $(SAMPLE) --seed $(SEED)

fuzz: .venv/.installed ## hostile inputs for every reader, in bounded memory; FUZZ_SECONDS=300
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(SEED)

audit: .venv/.linters ## known vulnerabilities of the versions in constraints.txt
	$(BIN)/python -m tests.audit

sbom: .venv/.linters ## what this environment holds and who brings it along, as CycloneDX JSON, in build/sbom.json
	mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible -o build/sbom.json $(BIN)/python

peers: .venv-peers/.installed ## other libraries' BERT4Rec, in an environment of their own, for make bench

bench: .venv/.installed ## time and memory next to other libraries, one table; QBERT_REAL_DATA=<folder> for real data
	$(BIN)/python -m tests.benchmarks

bench-full: .venv/.installed ## the same with more users and rounds, and what takes long
	$(BIN)/python -m tests.benchmarks --full

clean: ## forget the environments; runs stay
	rm -rf .venv .venv-peers

# The stamps are written last, so an interrupted installation is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "qbert-ray needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) install --index-url $(TORCH_INDEX) -c constraints.txt torch torchvision)
	$(PIP) install -c constraints.txt -e '.[test,jobs]'
	@touch $@

.venv/.linters: .venv/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

.venv-peers/.installed: tests/benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install -r tests/benchmarks/peers.txt
	@touch $@
