# Every target makes the virtual environment it needs, and installs nothing outside it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint docs bench peers

demo: .venv/examples.installed
	$(BIN)/python -m examples.demo

test: .venv/test.installed
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: .venv/test.installed
	$(BIN)/python -m pytest -n auto -m slow --ignore tests/test_workers.py
# Starts processes of its own, as many as two cores can take. Of several workers each would start them again: `--dist loadgroup` does not keep tests
# of one fixture together under pytest 9.2 (pytest-xdist, issue 1386).
	$(BIN)/python -m pytest -m slow tests/test_workers.py

lint: .venv/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Into site/; warnings fail.
docs: .venv/docs.installed
	$(BIN)/python -m mkdocs build --strict

# The quick form of every benchmark, about ten minutes, into runs/bench.
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

.venv:
	$(PYTHON) -m venv $@
