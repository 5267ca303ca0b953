# Two commands on a fresh machine: `make demo` and `make test`. Both need only python3 (3.10 or newer), g++ and make.
PYTHON ?= python3
SOURCES := $(shell find csrc setup.py pyproject.toml constraints.txt -type f)

.PHONY: help install demo test bench dist clean
help:
	@echo "make demo     sweep, plan, quantize, compare and generate on a bundled model"
	@echo "make test     run the tests"
	@echo "make bench    time klfast against its peers (a minute's run: .venv/bin/klfast bench --quick), and show it in docs/"
	@echo "make install  only make .venv and build the extension"
	@echo "make dist     build sdist and wheel into dist/"
	@echo "make clean    remove all that was built"

install: .venv/.installed

# pip does nothing for what is already there, so that a second run is quick.
.venv/.installed: $(SOURCES)
	@test -x .venv/bin/pip || $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("klfast needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools pybind11 torch
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --no-build-isolation --editable '.[test]'
	touch $@

demo: install
	.venv/bin/klfast demo

test: install
	.venv/bin/python -m pytest

bench: install
	.venv/bin/klfast bench --out bench/results
	.venv/bin/python -m bench.document

dist: install
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build
	.venv/bin/python -m build --outdir dist

clean:
	rm -rf .venv build dist *.egg-info klfast/_C*.so
