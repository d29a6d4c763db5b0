#!/bin/bash
# Slurm on Arm servers. Grace: two sockets of 72 cores, one process each. Graviton3 or 4: one socket of 64 or 96, one
# process (--ntasks-per-node=1 --cpus-per-task=64). `pytrain info` prints the core groups of a node.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=72
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK OMP_PROC_BIND=close OMP_PLACES=cores
# The signal lets the run save and stop with exit status 75: submitted again, it goes on bit for bit.
# Since Slurm 22.05 srun does not take over --cpus-per-task by itself, and would bind each process to one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores --mem-bind=local python -m pytrain train run.toml --resume auto
