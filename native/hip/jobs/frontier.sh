#!/bin/bash
# Eight ranks a node, one GPU (GCD) each: sbatch --account=PROJECT native/hip/jobs/frontier.sh run.toml
# Written from the site's documentation; never submitted.
#SBATCH --job-name=pytrain
#SBATCH --nodes=16 --time=02:00:00 --signal=TERM@180
#SBATCH --ntasks-per-node=8 --cpus-per-task=7 --gpus-per-task=1 --gpu-bind=closest
#SBATCH --constraint=nvme
set -euo pipefail
module load PrgEnv-gnu cray-python rocm craype-accel-amd-gfx90a
archive=$MEMBERWORK/${SLURM_JOB_ACCOUNT,,}/pytrain-env.tar.gz
local_folder=/mnt/bb/$USER
# The environment goes to each node's own disk: thousands of ranks that import from the shared file system wait for it.
sbcast --force "$archive" "$local_folder/env.tar.gz"
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c "mkdir -p '$local_folder/env' && tar -C '$local_folder/env' -xzf '$local_folder/env.tar.gz'"
python_version=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PYTHONPATH=$local_folder/env/lib/python$python_version/site-packages
export OMP_NUM_THREADS=7
export HSA_XNACK=1                # pages of managed memory migrate; else the GPU reads them over the bus
export MPICH_OFI_NIC_POLICY=GPU   # each rank's network card is the one on its GPU
export MPICH_GPU_SUPPORT_ENABLED=1  # for collectives.device_buffers = "direct"; staged needs none of it
# Block: consecutive ranks fill a node, so that tensor parallelism, the fastest axis, stays inside it.
srun --cpu-bind=cores --distribution=block:block python -m pytrain train "${1:?name a run.toml}" \
    --set run.device=hip --resume auto
