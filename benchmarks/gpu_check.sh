#!/usr/bin/env bash
# All that needs a GPU, in one go and without a network: build for the GPU at hand, test every CUDA kernel, time them.
# Needs a Python with a CUDA build of torch >= 2.11, pytest, scikit-build-core, pybind11, cmake and ninja, and nvcc >= 12.4.
# Leaves the environment of that Python alone. On a machine without a GPU it builds, and says what it could not do.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/build/gpu-site

nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU: tests are skipped, nothing is timed"
EDM2EXT_CUDA=ON "$python" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$site" . \
  --config-settings=build-dir=build/gpu
export PYTHONPATH=$site
# -P: the package of the checkout, which holds no library, must not be found first.
"$python" -P -m edm2ext
"$python" -P -m pytest -q -p no:cacheprovider tests/gpu tests/test_cuda_build.py
"$python" -P benchmarks/gpu_bandwidth.py
