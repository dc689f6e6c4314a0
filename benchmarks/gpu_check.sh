#!/usr/bin/env bash
# What needs a GPU, in stages of at most eight minutes: a (build, tests, sanitizers), b (kernel tables), c (training steps,
# sampling, memory), d (training and a profile), e (convolutions). Needs no network.
# Needs a Python with a CUDA build of torch >= 2.11, pytest, scikit-build-core, pybind11, cmake and ninja, and nvcc >= 12.4;
# leaves its environment and the GPU's settings alone. Without a GPU it builds, and says what it could not do; --dry-run
# does not build.
#   [PYTHON=python3] [COMMIT=hash] benchmarks/gpu_check.sh a|b|c|d|e [--only TEXT] [--minutes 8] [--results FOLDER] [--dry-run]
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" -m benchmarks.gpu_stages "$@"
