#!/usr/bin/env bash
# Starts a program with the deepspeed launcher, on one node or, without ssh, on each of several. On
# each node:
#
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 \
#       launch/deepspeed.sh launch/generate.py --tp 4 --sp 4 ...
#
# One node needs RANKS alone. With HOSTFILE, its `slots` are the ranks, and NODE_RANK is this host's
# line in it, counted from 0.
set -euo pipefail

program="$0 PROGRAM [ARGUMENTS]"
usage="usage: RANKS=N $program, or HOSTFILE=.. NODE_RANK=.. MASTER_ADDR=.. $program"
if [[ $# -lt 1 ]]; then
    echo "$usage" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ -n "${HOSTFILE:-}" ]]; then
    : "${NODE_RANK:?which line of HOSTFILE this host is, from 0}"
    : "${MASTER_ADDR:?address of the first host}"
    place=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
else
    : "${RANKS:?how many ranks (GPUs) this node has, or HOSTFILE}"
    place=(--num_gpus "$RANKS")
fi
exec deepspeed "${place[@]}" --master_port "${MASTER_PORT:-29500}" "$@"
