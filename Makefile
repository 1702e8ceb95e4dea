# Two commands are all a newcomer needs: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# Pinned so that every build sees the same headers; at run time any torch >= 2.10 will do.
TORCH ?= torch==2.13.0
OUT ?= out
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/include/*/*.h)

.PHONY: demo test crash-test lint gallery bench bench-cost bench-ops bench-growth bench-memory bench-cold-start \
  bench-report bench-throughput bench-peers peer-suites wheel-check cuda-check gpu-check clean

demo: $(VENV)/demo
	$(BIN)/pyfast-xai demo --out $(OUT)/demo

test: $(VENV)/test
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q $(ARGS)

# Runs on data sets: every point at which a writer can stop, hundreds of real SIGKILLs, ten thousand broken files.
crash-test: $(VENV)/test
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q tests/datasets -m extended $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BENCH = PYTHONPATH=bench $(BIN)/python -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds

# All that docs/performance.md shows, some twenty minutes; ARGS="--rows" keeps what was measured.
bench: bench-cost bench-ops bench-growth bench-memory bench-cold-start

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

bench-throughput: $(VENV)/test
	$(BIN)/python bench/throughput.py $(ARGS)

bench-peers: $(VENV)/test
	$(BIN)/python bench/peers.py $(ARGS)

# The tests of Captum, pytorch-grad-cam, torch-cam and zennit, fetched, on the classes of pyfast_xai.compat.
peer-suites: $(VENV)/test
	$(BIN)/python tests/compat/peer_suites.py --into $(OUT)/peer-suites $(ARGS)

# The picture of docs/gallery.md.
gallery: $(VENV)/test
	$(BIN)/python bench/gallery.py $(ARGS)

# Builds the wheel, installs it alone in a clean environment and uses it from another folder.
wheel-check: $(VENV)/build
	rm -rf dist $(VENV)-wheel
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip --disable-pip-version-check install --quiet $(TORCH)
	$(VENV)-wheel/bin/pip --disable-pip-version-check install --quiet dist/*.whl
	cp tests/smoke.py $(VENV)-wheel/smoke.py
	cd $(VENV)-wheel && bin/python smoke.py && bin/pyfast-xai backends

# Compiles the CUDA library where there is a compiler for it; no GPU is needed.
cuda-check: $(VENV)/build
	@if command -v nvcc > /dev/null; then \
	  $(BIN)/cmake -S . -B build/cuda -G Ninja -DPYFAST_XAI_CUDA=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) && $(BIN)/cmake --build build/cuda; \
	else echo "no nvcc on PATH, the CUDA library was not compiled"; fi

# Builds, tests and measures on the GPU of this machine, with the Python that has torch for CUDA: nothing is installed.
gpu-check:
	$(PYTHON) bench/gpu_check.py --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-wheel build dist $(OUT)

$(VENV)/build: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet numpy "scikit-build-core>=1.0.3" "cmake>=3.26" ninja
	touch $@

$(VENV)/demo: $(VENV)/build $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/test: $(VENV)/build $(SOURCES) tests/oracles.txt
	$(PIP) install --quiet --no-build-isolation --editable ".[test,bench]"
	$(PIP) install --quiet --no-deps --requirement tests/oracles.txt
	touch $@

# Types of what the package imports are read, too.
$(VENV)/lint: $(VENV)/test
	$(PIP) install --quiet "ruff==0.17.5" "mypy==2.4.1"
	touch $@
