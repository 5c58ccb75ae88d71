#!/usr/bin/env bash
# Starts the ranks of a job on all its nodes, waits for them, and ends with one code for all of them.
#
# Usage, inside a job, from the folder where `sbatch` was typed: slurm/launch.sh metalm-arguments...
#
# METALM_LAUNCHER=torchrun: one task per node, torchrun with a c10d rendezvous on the first node.
# METALM_LAUNCHER=srun: one task per rank, which reads its place from Slurm's variables.
# METALM_CODES: a folder that all nodes see; the ranks leave their exit codes in it, this script `cause`.
set -uo pipefail

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck source=slurm/cluster.sh
. "$here/cluster.sh"

ranks=$(ranks_per_node)
num_nodes=$SLURM_JOB_NUM_NODES
num_ranks=$((num_nodes * ranks))
METALM_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ' ') # in the order of their ranks
head=${METALM_NODES%% *}
# Below the ports that Linux gives to outgoing connections, and another one for each job and restart.
port=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 12000))

export METALM_NODES METALM_PYTHON METALM_CODES="${METALM_CODES:?}"
export MASTER_ADDR=$head MASTER_PORT=$port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-1} + ranks - 1) / ranks))}
if [[ -n ${METALM_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$METALM_INTERFACE GLOO_SOCKET_IFNAME=$METALM_INTERFACE
fi
on_nodes=(--nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1)
if [[ -n ${METALM_SCRATCH:-} ]]; then
    export TORCH_EXTENSIONS_DIR=$METALM_SCRATCH/torch_extensions TRITON_CACHE_DIR=$METALM_SCRATCH/triton
    export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=$METALM_SCRATCH/flash_attention
    # A start that was killed while it compiled leaves a lock for which all later ones would wait for ever.
    srun "${on_nodes[@]}" find "$METALM_SCRATCH" -path '*/torch_extensions/*' -name lock -delete 2>/dev/null
fi

if [[ ${METALM_LAUNCHER:-torchrun} = torchrun ]]; then
    layout=("${on_nodes[@]}")
    start=("$here/node.sh" "$head" "$port" "$ranks" "$METALM_PYTHON" -m metalm "$@")
elif [[ $METALM_LAUNCHER = srun ]]; then
    # Each rank sees all GPUs of its node and takes the one of its local number.
    layout=(--nodes="$num_nodes" --ntasks="$num_ranks" --ntasks-per-node="$ranks" --gpu-bind=none)
    cpus=$((${SLURM_CPUS_ON_NODE:-ranks} / ranks))
    layout+=(--cpus-per-task=$((cpus > 0 ? cpus : 1)))
    start=("$here/rank.sh" "$METALM_PYTHON" -m metalm "$@")
else
    give_up $EXIT_USAGE "METALM_LAUNCHER is $METALM_LAUNCHER, expected torchrun or srun"
fi

# Slurm tells a job that is cancelled by TERM to every process: the ranks stop and save, this script waits.
trap cut_short=yes TERM INT USR2
say "$num_ranks ranks on $num_nodes nodes by ${METALM_LAUNCHER:-torchrun}, first $head, port $port"
srun "${layout[@]}" "${in_container[@]}" --kill-on-bad-exit=1 --label --unbuffered "${within[@]}" \
    "${start[@]}" &
child=$!
cut_short=yes
while [[ -n $cut_short ]]; do # by a signal; the code of a child that has ended meanwhile is still known
    cut_short=''
    wait "$child"
    step_code=$?
done

# A network file system may show other nodes' files a moment late.
records=()
for _ in 1 2 3 4 5; do
    mapfile -t records < <(cat "$METALM_CODES"/rank_????? 2>/dev/null)
    ((${#records[@]} < num_ranks)) || break
    sleep 1
done

# The code for all: what starting again cannot mend comes first, then a node that is not fit, then what came first
# of an agreed stop and a fault: ranks whose peer has failed are asked to stop as well, and some may still say 75.
verdict='' cause=''
for wanted in $EXIT_USAGE $EXIT_DATA $EXIT_NODE; do
    for record in "${records[@]}"; do
        [[ ${record%% *} = "$wanted" ]] && verdict=$wanted cause="ranks ended with $wanted"
    done
    [[ -z $verdict ]] || break
done
if [[ -z $verdict ]]; then
    first=$(cd "$METALM_CODES" && grep -Hv '^0 ' rank_????? 2>/dev/null | sort -k 2 -n | head -n 1)
    if [[ -n $first ]]; then
        read -r code _ host <<<"${first#*:}"
        verdict=$code cause="${first%%:*} on $host ended with $code"
        ((code <= 128)) || cause="${first%%:*} on $host was killed by signal $((code - 128))"
        [[ $code != 137 ]] || cause+=" (out of memory?)"
        [[ $code != "$EXIT_RESTART" ]] || cause="ranks ended with $code"
    elif ((${#records[@]} < num_ranks)); then
        verdict=$((step_code ? step_code : EXIT_FAULT))
        cause="$((num_ranks - ${#records[@]})) of $num_ranks ranks vanished, srun ended with $step_code"
        [[ $step_code != 137 ]] || cause+=" (out of memory?)"
    else
        verdict=0 cause='done'
    fi
fi
echo "$cause" >"$METALM_CODES/cause"
exit "$verdict"
