# Two commands on a fresh machine: `make demo` and `make test`. Both need only python3 (3.10 or newer), g++ and make.
PYTHON ?= python3
SOURCES := $(shell find csrc setup.py pyproject.toml constraints.txt -type f)

.PHONY: help install demo test test-slow fuzz fuzz-kernels crash lint docs bench dist sanitize verify-xpu check-transformers clean
help:
	@echo "make demo     sweep, plan, quantize, compare and generate on a bundled model"
	@echo "make test     run the tests but the slow ones"
	@echo "make test-slow run those: compilers, killed processes, whole sweeps, Triton's kernels in its interpreter"
	@echo "make fuzz     feed damaged files to klfast's readers, for two minutes or for SECONDS=600"
	@echo "make fuzz-kernels  call the C++ kernels as clang's libFuzzer suggests, for two minutes or for SECONDS=600"
	@echo "make crash    kill klfast, fill its disk and so on while it writes, 20 times in each way or CASES=200"
	@echo "make lint     check style, types, imports between layers, spelling"
	@echo "make docs     build the documentation as a site in build/site, without the network"
	@echo "make bench    time klfast against its peers (a minute's run: .venv/bin/klfast bench --quick), and show it in docs/"
	@echo "make install  only make .venv and build the extension"
	@echo "make sanitize run the kernel tests under AddressSanitizer and UBSan"
	@echo "make verify-xpu check the Triton kernels for Intel's Xe2 GPUs, without one (Linux on x86-64; 1.6 GB)"
	@echo "make check-transformers compare the families' records with the newest transformers, or with VERSIONS=\"5.22.2 5.23.0\""
	@echo "make dist     build sdist and wheel into dist/"
	@echo "make clean    remove all that was built"

install: .venv/.installed

# pip does nothing for what is already there, so that a second run is quick.
.venv/.installed: $(SOURCES)
	@test -x .venv/bin/pip || $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("klfast needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools pybind11 torch
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --no-build-isolation --editable '.[test,triton]'
	touch $@

demo: install
	.venv/bin/klfast demo

# Tests in a process a core, each with one thread where a test does not say how many. The Triton kernels run in Triton's
# interpreter, which must be chosen before they are imported, so in a run of its own. Compiled Python is kept, whatever the
# environment says: many tests start processes of their own, and each process would rewrite the asserts of all tests anew.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
test test-slow: export OMP_NUM_THREADS := 1
test test-slow: export PYTHONDONTWRITEBYTECODE :=
test: install
	.venv/bin/python -m pytest $(IN_PARALLEL) -m "not slow"

test-slow: install
	.venv/bin/python -m pytest $(IN_PARALLEL) -m slow
	TRITON_INTERPRET=1 .venv/bin/python -m pytest $(IN_PARALLEL) tests/backends/device

fuzz: export OMP_NUM_THREADS := 1
fuzz fuzz-kernels: SECONDS := 120
fuzz: install
	.venv/bin/python tests/fuzz --seconds $(SECONDS)

fuzz-kernels: install
	.venv/bin/python tests/fuzz/csrc --seconds $(SECONDS)

crash: CASES := 20
crash: install
	.venv/bin/python tests/crash --cases $(CASES)

# pre-commit runs the same commands before a commit: .venv/bin/pre-commit install
lint: .venv/.lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(shell find csrc tests/csrc tests/fuzz/csrc -name '*.h' -o -name '*.cpp')
	.venv/bin/typos
	.venv/bin/lint-imports
	.venv/bin/mypy
	.venv/bin/python docs/draw.py --check

.venv/.lint: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[lint]'
	touch $@

docs: .venv/.docs
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --config-file docs/site/mkdocs.yml

.venv/.docs: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

bench: install
	.venv/bin/klfast bench --out bench/results
	.venv/bin/python -m bench.document

# The kernel tests against an extension with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize.
sanitize: export PYTHONDONTWRITEBYTECODE :=
sanitize: install
	.venv/bin/python tests/support/sanitizers.py $(IN_PARALLEL) -q -p no:cacheprovider \
	    tests/ops/test_dequant_matmul.py tests/ops/test_grouped_dequant_matmul.py tests/ops/test_linear.py \
	    tests/ops/test_divergence.py tests/ops/test_gathered_logits.py tests/ops/test_ssm_*.py \
	    tests/ops/test_delta_rule.py tests/ops/test_norm.py tests/ops/test_attention.py tests/nn/test_mamba_step.py tests/engine

# Triton's XPU backend comes as another package named triton, so in an environment of its own; the rest is that of .venv.
# Intel's OpenCL runtime for CPUs runs what it makes, where it installs; its own .icd file names another folder. Machine code
# is made by the ocloc on the PATH, or by a newer one: make verify-xpu OCLOC=/path/to/ocloc
XPU := build/xpu
XPU_CACHE ?= $(abspath $(XPU))/cache
verify-xpu: $(XPU)/.installed
	PYTHONPATH=.:tests/support:tests/ops TRITON_CACHE_DIR=$(XPU_CACHE) \
	    OCL_ICD_VENDORS=$(abspath $(XPU))/lib/libintelocl.so OCLOC=$(OCLOC) $(XPU)/bin/python tests/backends/verify_xpu.py

$(XPU)/.made: .venv/.installed
	test -x $(XPU)/bin/python || $(PYTHON) -m venv $(XPU)
	touch $@

$(XPU)/.triton: $(XPU)/.made Makefile
	$(XPU)/bin/python -m pip install --quiet --disable-pip-version-check triton-xpu==3.3.0b1 "setuptools<82"
	touch $@

$(XPU)/.installed: $(XPU)/.triton
	-$(XPU)/bin/python -m pip install --quiet --disable-pip-version-check \
	    pyopencl==2026.1.4 intel-opencl-rt==2026.2.0 intel-cmplr-lib-rt==2026.2.0
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(XPU)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-klfast.pth"
	touch $@

# Nothing is installed, so the versions may be any, also newer ones than pyproject.toml allows.
check-transformers: install
	PYTHONPATH=tests/support .venv/bin/python tests/acceleration/check_transformers.py $(VERSIONS)

# Build the wheel in the unpacked sdist, which has the same sources, so setup.py compiles no object that is up to date. With ccache the
# objects' lists of headers have paths from here, so .venv is there, too.
# With one compiler and umask, a commit's wheel always has the same bytes: .ci/reproducible
dist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2> /dev/null || echo 1577836800)
dist: install
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build
	rm -rf build/dist && mkdir -p build/dist dist && ln -s ../../.venv build/dist
	.venv/bin/python -m build --sdist --outdir build/dist
	cd build/dist && tar -xf *.tar.gz --strip-components 1 && mv *.tar.gz ../../dist && mkdir build && cp -pr ../temp.* build && \
	    ../../.venv/bin/python -m build --wheel --no-isolation --outdir ../../dist

clean:
	rm -rf .venv build dist *.egg-info klfast/_C*.so
