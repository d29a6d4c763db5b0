#!/bin/bash
# Fugaku: one process of 12 threads per core memory group, four per node. 384 nodes: 2 x 3 x 64 of the torus, 1536 ranks.
#PJM -L "rscgrp=large"
#PJM -L "node=2x3x64:torus"
#PJM -L "elapse=24:00:00"
#PJM -L "freq=2200"
#PJM --mpi "max-proc-per-node=4"
#PJM --mpi "rank-map-hostfile=ranks.txt"
#PJM --llio "localtmp-size=40Gi"
#PJM -x PJM_LLIO_GFSCACHE=/vol0004
#PJM -S
set -euo pipefail

# ranks.txt places the ranks; it must exist before pjsub. Tensor parallelism is fastest in pytrain's order, so its four
# ranks share a node, and the stages of a pipeline follow along z:
#   awk 'BEGIN { for (y = 0; y < 3; y++) for (x = 0; x < 2; x++) for (z = 0; z < 64; z++) for (cmg = 0; cmg < 4; cmg++)
#                printf "(%d,%d,%d)\n", x, y, z }' >ranks.txt

export OMP_NUM_THREADS=12 OMP_PROC_BIND=close
# Pages of 2 MiB, from the start and near the core that touches them first.
export XOS_MMM_L_HPAGE_TYPE=hugetlbfs XOS_MMM_L_PAGING_POLICY=demand:demand:demand
# Python and pytrain, packed into one file, go to each node's own storage: thousands of ranks importing from the
# parallel file system stop it. Pack with: tar -C environment -czf environment.tar.gz .
llio_transfer environment.tar.gz run.toml
unpack='mkdir -p "$PJM_LOCALTMP/environment" && tar -C "$PJM_LOCALTMP/environment" -xzf environment.tar.gz'
mpiexec sh -c "[ \$((PMIX_RANK % 4)) -ne 0 ] || { $unpack; }"  # once a node
# TERM two minutes before the end would save and stop; a job killed by its limit goes on from its last checkpoint.
mpiexec -stdout-proc output/%j.%r -stderr-proc output/%j.%r \
    sh -c 'exec "$PJM_LOCALTMP/environment/bin/python" -m pytrain train run.toml --resume auto'
llio_transfer --purge environment.tar.gz run.toml
