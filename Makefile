.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test coverage test-fast check lint docs demo-model bench bench-engine bench-encoder bench-serve bench-pauses bench-retriever bench-overload audit sbom parity crash swap gpu-check clean browser prometheus bench-build docker-test

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet -c constraints.txt
# every file in one process: its fixtures are made once, and its tests keep their order
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# on a GPU machine the interpreter that has CUDA torch may be the system's: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup  ## install both services into .venv (CPU)

setup-dev: $(VENV)/.setup-dev

$(VENV)/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the services into $(VENV), a few minutes the first time …"
	@$(PIP) -e '.[retriever,generator]'
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	@echo "installing the development tools into $(VENV) …"
	@$(PIP) -e '.[retriever,generator,demo,dev]'
	@touch $@

run: setup  ## start both services and print the address of the page
	@$(BIN)/rag up

test: setup-dev browser prometheus  ## set everything up and run all tests
	@$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not docker'

# Without the browser: its greenlets and coverage's tracing together can hang CPython 3.11 when a thread ends.
coverage: setup-dev  ## run the tests with coverage
	@$(BIN)/python -m pytest -m 'not docker and not browser' --cov --cov-report=term

test-fast: setup-dev
	@$(BIN)/python -m pytest -q $(IN_PARALLEL) -m 'not slow and not browser and not gpu and not docker'

docker-test: setup-dev  ## build both images and break the stack of containers on purpose (needs a Docker engine with Compose)
	@docker compose build
	@RAG_REQUIRE_DOCKER=1 $(BIN)/python -m pytest tests/docker

check: lint test-fast  ## lint, format, types, import rules, fast tests: what to run before a commit

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/hadolint --failure-threshold warning Dockerfile.retriever Dockerfile.generator

docs: setup-dev  ## build the API reference and both OpenAPI files into build/docs
	@$(BIN)/python -m services.docs build/docs

demo-model: setup-dev  ## train the demo's checkpoint from nothing (up to 90 minutes on 2 cores; resumes)
	@$(BIN)/rag demo train

bench: setup-dev  ## compare the services with transformers' own RAG, on the demo
	@$(BIN)/python -m benchmarks.answer

bench-engine: setup-dev  ## compare the decode engine with transformers' generation (hours; BENCH=--quick: 15 minutes)
	@$(BIN)/python -m benchmarks.engine $(BENCH)

bench-encoder: setup-dev  ## questions and passages through a DPR encoder, beside transformers' (2 minutes)
	@$(BIN)/python -W ignore -m benchmarks.encoder $(BENCH)

bench-serve: setup-dev  ## load both services at rising rates, beside transformers behind FastAPI (BENCH=--quick: 6 minutes; BENCH="--model base")
	@$(BIN)/python -W ignore -m benchmarks.serve $(BENCH)

bench-pauses: setup-dev  ## how long a stream pauses beside somebody else's large request (3 minutes)
	@$(BIN)/python -W ignore -m benchmarks.pauses $(BENCH)

bench-retriever: setup-dev  ## compare the retriever with raw faiss, txtai, Chroma and transformers (BENCH=--quick: minutes)
	@$(BIN)/python -W ignore -m benchmarks.retriever $(BENCH)

bench-overload: setup-dev  ## ten times the capacity for two minutes, and a polite client beside a flood (5 minutes)
	@$(BIN)/python -W ignore -m benchmarks.overload $(BENCH)

audit: setup-dev  ## look the installed runtime dependencies up among known vulnerabilities
	@$(BIN)/python -m services.supply audit

sbom: setup-dev  ## write a CycloneDX bill of materials of what the services run on to build/sbom.json
	@$(BIN)/python -m services.supply sbom build/sbom.json

bench-build: setup-dev  ## build a million passages, killed twice, and hold the plan to it (BENCH="--count 100000": minutes)
	@$(BIN)/python -W ignore -m benchmarks.build $(BENCH)

parity: setup-dev  ## compare token ids with transformers' on N random models, inputs and options (N=500)
	@$(BIN)/python -W ignore -m tests.parity $(or $(N),500)

crash: setup-dev  ## kill a retriever under writes and builds N times, and look for what is lost (N=20, SEED=…)
	@$(BIN)/python -W ignore -m tests.crash $(or $(N),20) $(if $(SEED),--seed $(SEED))

swap: setup-dev  ## move an alias and build generations under N searches, and look for errors and mixed answers (N=10000)
	@$(BIN)/python -W ignore -m tests.swap $(or $(N),10000)

gpu-check:  ## everything that runs on CUDA against the CPU, and beside its rivals; says so where there is no CUDA
	@mkdir -p build benchmarks/results
	@failed=0; \
	$(GPU_PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu || failed=1; \
	if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(GPU_PYTHON) -W ignore -m benchmarks.retriever_gpu --count 100000 || failed=1; \
	  $(GPU_PYTHON) -W ignore -m benchmarks.engine --device cuda --shape base large --batch 4 8 --beams 1 4 \
	    --output benchmarks/results/engine_cuda.json || failed=1; \
	  $(GPU_PYTHON) -W ignore -m benchmarks.decode_step --output benchmarks/results/decode_step_cuda.json || failed=1; \
	else echo "torch sees no CUDA device here: the benchmarks beside the rivals need one"; fi; \
	exit $$failed

browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing chromium for the browser tests …"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "no chromium here: the browser tests will be skipped"; fi; }

prometheus:
	@command -v prometheus >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing prometheus for the test of the dashboard …"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null; \
	  else echo "no prometheus here: the test that asks a real one will be skipped"; fi; }

clean:  ## remove the virtual environment, caches and the data folder
	rm -rf $(VENV) build dist data .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
