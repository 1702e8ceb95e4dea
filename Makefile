# A newcomer needs `make demo`, a contributor `make check` before each commit and `make test` before a change is sent.

PYTHON ?= python3
VENV ?= .venv
# Pinned so that every build sees the same headers; at run time any torch >= 2.10 will do.
TORCH ?= torch==2.13.0
OUT ?= out
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/include/*/*.h) \
  csrc/generate.py kernels/checks.py kernels/enums.py

.PHONY: demo check test docs notebooks crash-test fuzz sanitize sanitize-memory sanitize-threads lint gallery bench \
  bench-quick bench-quick-avx2 bench-cost bench-ops \
  bench-growth bench-memory bench-cold-start bench-report bench-throughput bench-throughput-avx2 bench-peers \
  peer-suites report-picture wheel-check cuda-check aarch64-check gpu-check zoo clean

demo: $(VENV)/demo
	$(BIN)/pyfast-xai demo --out $(OUT)/demo

# Two workers of one thread each: most tests are small, and threads of several workers would wait for each other. Tests of
# one `xdist_group` share a worker.
PYTEST := OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

# What a contributor runs before each commit: a few minutes on two cores. It needs no network, photographs or browser.
CHECKED := tests/test_import_order.py tests/test_contributing.py tests/test_public_api.py tests/test_explanation.py tests/tape tests/rules \
  tests/explainers/test_bad_input.py tests/explainers/test_backprop.py tests/explainers/test_cam.py \
  tests/cli/test_settings.py

check: lint
	$(PYTEST) $(or $(ARGS),$(CHECKED))

test: $(VENV)/test
	@echo "All tests, on two workers: some 25 minutes on two cores. \"make check\" is for each commit."
	$(PYTEST) $(ARGS)

# Runs on data sets: every point at which a writer can stop, a thousand SIGKILLs, ten thousand broken files, a thousand
# hostile names.
crash-test: $(VENV)/test
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q tests/datasets -m extended $(ARGS)

# The C++ ops under sanitizers, with arguments drawn to do harm: memory and arithmetic, then races of the parallel kernels.
# Any report ends it.
sanitize: sanitize-memory sanitize-threads

sanitize-memory: SANITIZERS := address,undefined
sanitize-memory: RUNTIME := libasan.so
sanitize-memory: EXAMPLES := 100
sanitize-threads: SANITIZERS := thread
sanitize-threads: RUNTIME := libtsan.so
sanitize-threads: EXAMPLES := 40
sanitize-memory sanitize-threads: $(VENV)/test
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DPYFAST_XAI_EXT=ON -DPYFAST_XAI_SANITIZE=$(SANITIZERS) \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/$@
	OMP_NUM_THREADS=2 PYFAST_XAI_EXAMPLES=$(EXAMPLES) PYTHONSAFEPATH=1 $(BIN)/python tests/ops/sanitized.py $(RUNTIME) \
	  build/$@/_C.so -q -p no:cacheprovider tests/ops/test_checks.py -k "cpp_says or torch_calls_it" $(ARGS)

# Draws random programs for SECONDS seconds and prints those whose gradient is not autograd's.
fuzz: $(VENV)/test
	$(BIN)/python tests/fuzz/programs.py --seconds $(or $(SECONDS),60) $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/include/*/*.h)
	$(BIN)/mypy

BENCH = PYTHONPATH=bench $(BIN)/python -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds

# All that docs/performance.md shows, some twenty minutes; ARGS="--rows" keeps what was measured.
bench: bench-cost bench-ops bench-growth bench-memory bench-cold-start

# The goals on this machine and what falls short, in under ten minutes; ARGS="--rows" keeps what was measured.
bench-quick: $(VENV)/test
	$(BIN)/python bench/quick.py $(ARGS)

# The same with AVX2 alone, on a machine with AVX-512. Our clones follow the processor, which no setting changes, so that
# a library with AVX2 alone is built.
bench-quick-avx2: AVX2 := quick
bench-throughput-avx2: AVX2 := throughput
bench-quick-avx2 bench-throughput-avx2: $(VENV)/test
	$(BIN)/cmake -S . -B build/avx2 -G Ninja -DPYFAST_XAI_EXT=ON -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CXX_FLAGS="-march=x86-64-v3 -DPYFAST_XAI_ONE_TARGET" -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/avx2 --target _C
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	  GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD \
	  $(BIN)/python bench/$(AVX2).py --library build/avx2/_C.so $(ARGS)

bench-cost: $(VENV)/test
	$(BENCH) bench/test_cost.py $(ARGS)

bench-ops: $(VENV)/test
	$(BENCH) bench/test_ops.py $(ARGS)

bench-growth: $(VENV)/test
	$(BENCH) bench/test_growth.py $(ARGS)

bench-memory: $(VENV)/test
	$(BIN)/python bench/memory.py $(ARGS)

bench-cold-start: $(VENV)/test
	$(BIN)/python bench/cold_start.py $(ARGS)

# Draws docs/performance.md from all that was measured.
bench-report: $(VENV)/test
	$(BIN)/python bench/report.py

# Runs beside what they are made of; ARGS="--rows" keeps what was measured.
bench-throughput: $(VENV)/test
	$(BIN)/python bench/throughput.py $(ARGS)

# Every explainer on a small model of every family of timm, Transformers, torchvision, segmentation-models-pytorch, MONAI
# and Ultralytics, as far as they are installed; hours on two cores, and it goes on where it was stopped.
zoo: $(VENV)/test
	$(BIN)/python bench/zoo.py $(ARGS)
	$(BIN)/python bench/zoo.py --table

bench-peers: $(VENV)/test
	$(BIN)/python bench/peers.py $(ARGS)

# The tests of Captum, pytorch-grad-cam, torch-cam and zennit, fetched, on the classes of pyfast_xai.compat.
peer-suites: $(VENV)/test
	$(BIN)/python tests/compat/peer_suites.py --into $(OUT)/peer-suites $(ARGS)

# The site in out/site, with warnings as errors. Its environment has neither torch nor this package; Python >= 3.11.
docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet --site-dir $(abspath $(OUT))/site

$(VENV)-docs/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip --disable-pip-version-check install --quiet $$($(PYTHON) -c \
	  "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

# What the notebooks show on the site.
notebooks: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebooks/run.py

# The pictures of docs/gallery.md and README.
gallery: $(VENV)/test
	$(BIN)/python bench/gallery.py $(ARGS)

# The picture of docs/report.md, in Chromium.
report-picture: $(VENV)/test
	$(BIN)/python bench/report_picture.py

# Builds the wheel, installs it alone in a clean environment and uses it from another folder.
wheel-check: $(VENV)/build
	rm -rf dist $(VENV)-wheel
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV)-wheel/bin/pip --disable-pip-version-check install --quiet dist/*.whl
	cp tests/smoke.py $(VENV)-wheel/smoke.py
	cd $(VENV)-wheel && bin/python smoke.py && bin/pyfast-xai backends

# What the compilers make of the CUDA and Triton kernels, against bench/data/machine_code.csv; no GPU is needed. Where
# there is no nvcc, Triton's kernels alone.
cuda-check: $(VENV)/test
	@if command -v nvcc > /dev/null; then \
	  $(BIN)/cmake -S . -B build/cuda -G Ninja -DPYFAST_XAI_CUDA=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DCMAKE_CUDA_ARCHITECTURES="80-real;90-real;100-real;120-real" \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) && $(BIN)/cmake --build build/cuda --target _C_cuda && \
	  $(BIN)/python bench/cuda_check.py --library build/cuda/_C_cuda.so $(ARGS); \
	else echo "no nvcc on PATH, the CUDA library was not compiled"; $(BIN)/python bench/cuda_check.py $(ARGS); fi

# Whether the C++ library compiles for 64-bit ARM; nothing is linked or run. Needs aarch64-linux-gnu-g++.
aarch64-check: $(VENV)/build
	$(BIN)/python csrc/generate.py kernels build/$@
	headers=$$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")/include; \
	for file in $(filter-out %/sanitized_threads.cpp,$(wildcard csrc/cpu/*.cpp)); do \
	  aarch64-linux-gnu-g++ -std=c++20 -O1 -Wall -Wextra -Werror -ffp-contract=fast -fsyntax-only -Icsrc -Icsrc/include \
	    -Ibuild/$@ -isystem $$headers -DTORCH_TARGET_VERSION=0x020A000000000000 $$file || exit 1; done

# Builds, tests and measures on the GPU of this machine, with the Python that has torch for CUDA: nothing is installed.
gpu-check:
	$(PYTHON) bench/gpu_check.py --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-docs build dist $(OUT)

$(VENV)/build: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet numpy "scikit-build-core>=1.0.3" "cmake>=3.26" ninja
	touch $@

$(VENV)/demo: $(VENV)/build $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/test: $(VENV)/build $(SOURCES) tests/requirements-peers.txt
	$(PIP) install --quiet --no-build-isolation --editable ".[test,bench]"
	$(PIP) install --quiet --no-deps --requirement tests/requirements-peers.txt
	touch $@

# Types of what the package imports are read, too.
$(VENV)/lint: $(VENV)/test
	$(PIP) install --quiet "ruff==0.17.5" "mypy==2.4.1" "clang-format==20.1.8" "pyright[nodejs]==1.1.414"
	touch $@
