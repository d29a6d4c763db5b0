#!/bin/bash
# Fugaku: one process of 48 threads per node, the layout of Fugaku-LLM (tensor parallelism 6, pipeline 8). 48 nodes here:
# 6 x 1 x 8 of the torus; a job of 13,824 nodes is 48x6x48.
#PJM -L "rscgrp=small-torus"
#PJM -L "node=6x1x8:torus"
#PJM -L "elapse=24:00:00"
#PJM -L "freq=2200"
#PJM --mpi "max-proc-per-node=1"
#PJM --mpi "rank-map-hostfile=ranks.txt"
#PJM --llio "localtmp-size=40Gi"
#PJM -x PJM_LLIO_GFSCACHE=/vol0004
#PJM -S
set -euo pipefail

# The six ranks of a tensor-parallel group are neighbours along x, the eight stages along z:
#   awk 'BEGIN { for (z = 0; z < 8; z++) for (x = 0; x < 6; x++) printf "(%d,0,%d)\n", x, z }' >ranks.txt

export OMP_NUM_THREADS=48 OMP_PROC_BIND=close
# Interleaved over the four groups: with demand paging near the first thread, one group's memory would serve them all.
export XOS_MMM_L_HPAGE_TYPE=hugetlbfs XOS_MMM_L_PAGING_POLICY=demand:interleave:demand
llio_transfer environment.tar.gz run.toml
mpiexec sh -c 'mkdir -p "$PJM_LOCALTMP/environment" && tar -C "$PJM_LOCALTMP/environment" -xzf environment.tar.gz'
mpiexec -stdout-proc output/%j.%r -stderr-proc output/%j.%r \
    sh -c 'exec "$PJM_LOCALTMP/environment/bin/python" -m pytrain train run.toml --resume auto'
llio_transfer --purge environment.tar.gz run.toml
