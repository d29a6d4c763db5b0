#!/bin/bash
# Fugaku: one process of 48 threads per node, the layout of Fugaku-LLM (tensor parallelism 6, pipeline 8). 48 nodes here:
# 6 x 1 x 8 of the torus; a job of 13,824 nodes is 48x6x48 in the resource group large.
# Yours to fill in: the group (-g) and the volumes that your project lies on (PJM_LLIO_GFSCACHE).
#PJM -g "hp000000"
#PJM -L "rscgrp=small-torus"
#PJM -L "node=6x1x8:torus"
#PJM -L "elapse=24:00:00"
# Jobs run in eco mode unless they say otherwise: 2.2 GHz, but one of the two multiply-add pipes, half of the peak.
#PJM -L "freq=2200,eco_state=0"
#PJM --mpi "max-proc-per-node=1"
#PJM --mpi "rank-map-hostfile=ranks.txt"
#PJM --llio "localtmp-size=40Gi"
#PJM -x PJM_LLIO_GFSCACHE=/vol0004
#PJM -S
set -euo pipefail

# The six ranks of a tensor-parallel group are neighbours along x, the eight stages along z:
#   awk 'BEGIN { for (z = 0; z < 8; z++) for (x = 0; x < 6; x++) printf "(%d,0,%d)\n", x, z }' >ranks.txt

export OMP_NUM_THREADS=48 OMP_PROC_BIND=close PLE_MPI_STD_EMPTYFILE=off
# Pages from the four groups in turn: from the group that touches them first, one would serve what all read.
export OMPI_MCA_plm_ple_memory_allocation_policy=interleave_all
# Pages of 2 MiB for what malloc gives (Python itself is not linked with the library).
export XOS_MMM_L_HPAGE_TYPE=hugetlbfs XOS_MMM_L_PAGING_POLICY=demand:demand:demand
export LARGE_PAGES=/opt/FJSVxos/mmm/lib64/libmpg.so.1
# Python and pytrain, packed into one file, go to each node's own storage: see fugaku-cmg.sh.
llio_transfer environment.tar.gz run.toml
mpiexec sh -c 'mkdir -p "$PJM_LOCALTMP/environment" && tar -C "$PJM_LOCALTMP/environment" -xzf environment.tar.gz'
mpiexec -stdout-proc output.%j/%/1000r/out -stderr-proc output.%j/%/1000r/err \
    sh -c 'exec env LD_PRELOAD="$LARGE_PAGES" "$PJM_LOCALTMP/environment/bin/python" -m pytrain train run.toml --resume auto'
llio_transfer --purge environment.tar.gz run.toml
