# Every target makes the virtual environment it needs, and installs nothing outside it.
PYTHON ?= python3
BIN := .venv/bin
# tensorflow==2.20.0 and so on.
LOWEST = $(shell sed -En 's/^    (tensorflow|keras|numpy)>=(.*)/\1==\2.0/p' setup.cfg)

# Of pytest: one a core. Each begins with a share of the tests in their order, so that few of them make a fixture that another one makes, too.
WORKERS := -n auto --dist worksteal

.PHONY: demo test test-slow test-lowest fuzz lint docs tables bench peers

demo: .venv/examples.installed
	$(BIN)/python -m examples.demo

test: .venv/test.installed
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-slow: .venv/test.installed
	$(BIN)/python -m pytest $(WORKERS) -m slow --ignore tests/test_workers.py
# Starts processes of its own, as many as two cores can take. Of several workers each would start them again: `--dist loadgroup` does not keep tests
# of one fixture together under pytest 9.2 (pytest-xdist, issue 1386).
	$(BIN)/python -m pytest -m slow tests/test_workers.py

# The lowest versions that setup.cfg allows, in an environment of their own; PYTHON=python3.11, since NumPy 2.0 has no wheels for 3.13. With
# TensorFlow's graph optimizer, as users have it.
test-lowest: .venv-lowest/test.installed
	KERAS_HF_OPTIMIZE_GRAPHS=1 .venv-lowest/bin/python -m pytest $(WORKERS) -m "not slow"

# Random programs beside dense oracles, for MINUTES from SEED on; failures and a summary in runs/fuzz.
fuzz: .venv/test.installed
	TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=.:tests $(BIN)/python -m fuzz

lint: .venv/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Into site/; warnings fail.
docs: .venv/docs.installed
	KERAS_HF_EXECUTE_NOTEBOOKS=1 $(BIN)/python -m mkdocs build --strict

# The tables of README.md and docs that are made from benchmarks/results.
tables: .venv/benchmarks.installed
	$(BIN)/python -m benchmarks.tables

# The quick form of every benchmark, into runs/bench.
bench: .venv/benchmarks.installed peers
	$(BIN)/python -m benchmarks

# Other libraries, each in an environment of its own: about 2.5 GB with wheels for CPUs, more where pip finds those with CUDA alone.
PEERS := jax torch kfac
peers: $(PEERS:%=.venv-peers/%.installed)

.venv-peers/%.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

# One stamp for each extra of setup.cfg; a change there installs it again.
.venv/%.installed: setup.cfg | .venv
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

.venv-lowest/test.installed: setup.cfg
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable ".[test]" $(LOWEST)
	touch $@

.venv:
	$(PYTHON) -m venv $@
