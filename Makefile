# make demo | test | test-slow | soak | lint | setup | bench | bench-cpp | arches | clean        (PYTHON=python3.12 make setup: another interpreter)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edm2ext-installed
NATIVE_SOURCES := CMakeLists.txt pyproject.toml requirements.txt $(shell find csrc -type f)
PYTEST := $(BIN)/python -m pytest
BUILD = $(wildcard build/cp$(shell $(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])')-*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-slow soak lint bench bench-cpp arches clean

setup: $(STAMP)
	@$(BIN)/python -m edm2ext

$(STAMP): $(NATIVE_SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "edm2ext needs Python 3.10 or newer; $(PYTHON) is %d.%d (choose another: PYTHON=python3.12 make setup)" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies (requirements.txt)"
	@$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	@echo "building the extension"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . --config-settings=build-dir=build/{wheel_tag}
	@touch $(STAMP)

demo: setup
	@$(BIN)/python -m python_train.run

test: setup
	$(PYTEST) tests -n auto --dist loadfile

test-slow: setup
	$(PYTEST) tests -m slow

# Two hours of training in which nothing may grow.
soak: setup
	EDM2EXT_SOAK_SECONDS=7200 $(PYTEST) tests/train/test_soak.py -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	@! grep -rnE '#include *[<"](torch|ATen|c10)/' csrc/include csrc/cpu csrc/cuda || (echo "torch headers stay in csrc/torch (CONTRIBUTING.md)"; exit 1)

bench: setup
	$(BIN)/python -m benchmarks.run

# build/benchmarks/edm2_cuda_bench and edm2_cpu_bench: the kernels without Python and torch (CONTRIBUTING.md), from the
# object files of the set-up.
bench-cpp: setup
	$(BIN)/cmake $(BUILD) -DEDM2EXT_BENCHMARKS=ON -DCMAKE_RUNTIME_OUTPUT_DIRECTORY=$(abspath build/benchmarks)
	$(BIN)/cmake --build $(BUILD) --target edm2_benchmarks

# Every architecture the kernels are written for; nothing is installed.
arches: setup
	$(BIN)/cmake -S . -B build/arches -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DEDM2EXT_CUDA=ON "-DEDM2EXT_CUDA_ARCHS=80;86;89;90a;100a;120a"
	$(BIN)/cmake --build build/arches

clean:
	rm -rf build $(STAMP)
