#!/usr/bin/env bash
# Starts a program on one or several nodes with torchrun. On each node:
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 RANKS=8 \
#       launch/torchrun.sh launch/generate.py --tp 4 --sp 4 ...
#
# One node needs RANKS alone. NODE_RANK is 0 on the node of MASTER_ADDR and counts up on the others.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: [NODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500] RANKS=N" \
        "$0 PROGRAM [ARGUMENTS]" >&2
    exit 2
fi
: "${RANKS:?how many ranks (GPUs) this node has}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# exec: a signal to this script's process then reaches torchrun itself, which passes it on.
exec torchrun \
    --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$RANKS" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    "$@"
