#!/bin/bash
# On a machine with an NVIDIA GPU and nvcc, in a clone: bash native/hip/jobs/nvidia.sh FOLDER
# Builds the module for it into FOLDER, without a network where the build's needs are installed (`[build-system]` of
# pyproject.toml; pytest, numpy, ml_dtypes for the tests), and runs the tests of operations there. Never run on a GPU.
set -euo pipefail
folder=${1:?name a folder for the module and the results}
architecture=${2:-sm_90}
mkdir -p "$folder"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/gpu.txt"
nvcc --version | tail -n 2 | tee -a "$folder/gpu.txt"
SKBUILD_CMAKE_DEFINE="PYTRAIN_WERROR=ON;PYTRAIN_HIP=CUDA;PYTRAIN_CUDA_ARCHITECTURES=$architecture" pip install \
    --no-deps --no-build-isolation --upgrade --target "$folder/cuda" -C build-dir="$folder/build" .
PYTHONPATH=$folder/cuda timeout 300 python -m pytest -q --durations=10 tests/hip 2>&1 | tee "$folder/tests.txt"
