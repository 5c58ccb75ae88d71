# What every template starts with: where it was submitted, the cluster's settings, and how to run Python.
# Sourced by the batch scripts; not for use alone.
# shellcheck shell=bash

# shellcheck disable=SC2034  # for the scripts that source this
readonly EXIT_USAGE=64 EXIT_DATA=65 EXIT_NODE=69 EXIT_FAULT=70 EXIT_RESTART=75

say() { printf '[slurm %(%H:%M:%S)T] %s\n' -1 "$*"; }

give_up() {
    say "error: $2" >&2
    exit "$1"
}

if [[ -n ${METALM_CLUSTER:-} ]]; then
    [[ -r $METALM_CLUSTER ]] || give_up $EXIT_USAGE "METALM_CLUSTER names $METALM_CLUSTER, which cannot be read"
    # What was set for this job, by hand or by its template, wins over the file.
    declare -A set_before=()
    for name in "${!METALM_@}"; do set_before[$name]=${!name}; done
    # shellcheck source=/dev/null
    . "$METALM_CLUSTER"
    for name in "${!set_before[@]}"; do export "$name=${set_before[$name]}"; done
fi
if [[ -n ${METALM_MODULES:-} ]]; then
    # shellcheck disable=SC2086  # a list
    module load $METALM_MODULES || give_up $EXIT_USAGE "cannot load the modules $METALM_MODULES"
fi

# Of a job that was submitted with `--export=NONE`, the default of many sites, tasks and successors would start
# without what is set here.
export SLURM_EXPORT_ENV=ALL SBATCH_EXPORT=ALL

METALM_PYTHON=${METALM_PYTHON:-.venv/bin/python}
# The library beside these scripts, such as a snapshot, wins over an installed one.
[[ -z ${METALM_ROOT:-} ]] || export PYTHONPATH=$METALM_ROOT/src${PYTHONPATH:+:$PYTHONPATH}
in_container=() within=() # options of srun, by which pyxis takes a container; words in front of each command
if [[ -n ${METALM_CONTAINER:-} && ${METALM_CONTAINER_RUNTIME:-pyxis} = pyxis ]]; then
    in_container=("--container-image=$METALM_CONTAINER" "--container-workdir=$PWD")
    [[ -z ${METALM_MOUNTS:-} ]] || in_container+=("--container-mounts=$METALM_MOUNTS")
elif [[ -n ${METALM_CONTAINER:-} && $METALM_CONTAINER_RUNTIME = apptainer ]]; then
    within=(apptainer exec --pwd "$PWD" --bind "$PWD")
    [[ -z ${METALM_MOUNTS:-} ]] || within+=(--bind "$METALM_MOUNTS")
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || within+=(--nv)
    within+=("$METALM_CONTAINER")
elif [[ -n ${METALM_CONTAINER:-} ]]; then
    give_up $EXIT_USAGE "METALM_CONTAINER_RUNTIME is $METALM_CONTAINER_RUNTIME, expected pyxis or apptainer"
fi

# Run Python once, on the node of the batch script.
run_python() {
    if [[ ${#in_container[@]} = 0 ]]; then
        "${within[@]}" "$METALM_PYTHON" "$@"
    else
        srun --nodes=1 --ntasks=1 --relative=0 "${in_container[@]}" "$METALM_PYTHON" "$@"
    fi
}

# The words of a setting, each before a NUL. They are quoted as for a shell, but nothing is expanded or executed.
words_of() {
    xargs -r printf '%s\0' <<<"$1"
}

# Ranks on each node: as set, else a GPU each, else one.
ranks_per_node() {
    echo "${METALM_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
}
