#!/usr/bin/env bash
# One node under torchrun: joins the rendezvous at HEAD:PORT and starts the ranks of this node.
#
# Usage: node.sh HEAD PORT RANKS_PER_NODE COMMAND...
set -u

head=$1 port=$2 ranks=$3
shift 3
# What decides how long ranks may save after a SIGTERM is Slurm (KillWait, GraceTime), not torchrun with its 30 s.
# Ranks whose peer has failed are still ended after 30 s: there torchrun does not look at this.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Which node hosts the store is passed on, not guessed from host names, which clusters spell in many ways.
is_host=false
[[ $SLURM_NODEID = 0 ]] && is_host=true
exec "$METALM_PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-conf "is_host=$is_host,join_timeout=300" --local-addr "$SLURMD_NODENAME" \
    --no-python "$(dirname "$0")/rank.sh" "$@"
