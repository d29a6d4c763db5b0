#!/bin/bash
# Once, on a login node of Frontier, in a clone of this repository: PROJECT=abc123 bash native/hip/jobs/frontier-build.sh
# Written from the site's documentation; never run there.
set -euo pipefail
: "${PROJECT:?set PROJECT to your allocation}"
module load PrgEnv-gnu cray-python rocm craype-accel-amd-gfx90a cmake
environment=$MEMBERWORK/$PROJECT/pytrain-env
python -m venv "$environment"
. "$environment/bin/activate"
# With the accelerator module loaded `cc` links the library that lets Cray MPICH take addresses of GPUs.
MPICC="cc -shared" pip install --no-binary mpi4py mpi4py
SKBUILD_CMAKE_DEFINE=PYTRAIN_HIP=ON pip install .
tar -C "$environment" -czf "$environment.tar.gz" .
