#!/bin/bash
# Fugaku: one process of 12 threads per core memory group, four per node. 384 nodes: 4 x 6 x 16 of the torus, 1536 ranks.
# Yours to fill in: the group (-g) and the volumes that your project lies on (PJM_LLIO_GFSCACHE).
#PJM -g "hp000000"
#PJM -L "rscgrp=small-torus"
#PJM -L "node=4x6x16:torus"
#PJM -L "elapse=24:00:00"
# Jobs run in eco mode unless they say otherwise: 2.2 GHz, but one of the two multiply-add pipes, half of the peak.
#PJM -L "freq=2200,eco_state=0"
#PJM --mpi "max-proc-per-node=4"
#PJM --mpi "rank-map-hostfile=ranks.txt"
#PJM --llio "localtmp-size=40Gi"
#PJM -x PJM_LLIO_GFSCACHE=/vol0004
#PJM -S
set -euo pipefail

# ranks.txt places the ranks; it must exist before pjsub. Tensor parallelism is fastest in pytrain's order, so its four
# ranks share a node, and the 16 stages of a pipeline follow along z:
#   awk 'BEGIN { for (y = 0; y < 6; y++) for (x = 0; x < 4; x++) for (z = 0; z < 16; z++) for (cmg = 0; cmg < 4; cmg++)
#                printf "(%d,%d,%d)\n", x, y, z }' >ranks.txt

export OMP_NUM_THREADS=12 OMP_PROC_BIND=close PLE_MPI_STD_EMPTYFILE=off
# Memory of the process's own group and no other.
export OMPI_MCA_plm_ple_memory_allocation_policy=bind_local
# Pages of 2 MiB for what malloc gives (Python itself is not linked with the library), when they are first touched: by
# default they are all taken from the first group.
export XOS_MMM_L_HPAGE_TYPE=hugetlbfs XOS_MMM_L_PAGING_POLICY=demand:demand:demand
export LARGE_PAGES=/opt/FJSVxos/mmm/lib64/libmpg.so.1
# Python and pytrain, packed into one file, go to each node's own storage: thousands of ranks importing from the
# parallel file system stop it. Pack with: tar -C environment -czf environment.tar.gz .
llio_transfer environment.tar.gz run.toml
unpack='mkdir -p "$PJM_LOCALTMP/environment" && tar -C "$PJM_LOCALTMP/environment" -xzf environment.tar.gz'
mpiexec sh -c "[ \"\$PLE_RANK_ON_NODE\" -ne 0 ] || { $unpack; }"  # once a node
# A job killed by its limit goes on from its last checkpoint when it is submitted again.
mpiexec -stdout-proc output.%j/%/1000r/out -stderr-proc output.%j/%/1000r/err \
    sh -c 'exec env LD_PRELOAD="$LARGE_PAGES" "$PJM_LOCALTMP/environment/bin/python" -m pytrain train run.toml --resume auto'
llio_transfer --purge environment.tar.gz run.toml
