#!/usr/bin/env bash
# Stands in for `python` where a test is about the batch script and not about training: a rank of
# `python -m metalm train` that counts steps, saves each fifth, and looks at the stop file before each.
#
#   steps=N          done after N steps
#   fails=CODE@N     ends with CODE at step N, unless it was resumed from there
#   fails=CODE@0     ends with CODE before the first step
#   hangs=N          does nothing more at step N, unless it was resumed from there
#   saves_s=S        takes S seconds to save when it is asked to stop
#   eats=N           takes 300 MB at step N, unless it was resumed from there
#
# With BARK it leaves that word before it fails, as the watchdog does. Its preflight finds nothing; with
# REAL_PYTHON it is the real one, which sees ODD_PATH first on ODD_NODE.
set -eu

folder='' steps=1000000 fails=0@-1 hangs=-1 eats=-1 saves_s=0
for word in "$@"; do
    case $word in
        run.folder=*) folder=${word#*=} ;;
        steps=*) steps=${word#*=} ;;
        fails=*) fails=${word#*=} ;;
        hangs=*) hangs=${word#*=} ;;
        eats=*) eats=${word#*=} ;;
        saves_s=*) saves_s=${word#*=} ;;
    esac
done
if [[ " $* " = *" --dry-run "* ]]; then
    printf 'run folder: %s/run\ninitial weights: none\n' "$folder"
    exit 0
fi

if [[ " $* " = *" preflight "* ]]; then
    [[ -n ${REAL_PYTHON:-} ]] || exit 0
    [[ $SLURMD_NODENAME != "${ODD_NODE:-}" ]] || export PYTHONPATH=$ODD_PATH
    exec "$REAL_PYTHON" "$@"
fi

run=$folder/run asked=''
mkdir -p "$run/checkpoints"
trap 'asked=yes' TERM USR2
newest=$(find "$run/checkpoints" -maxdepth 1 -name 'step_*' | sort | tail -n 1)
step=${newest##*/step_}
step=$((10#${step:-0})) resumed=$step
save() {
    local name
    printf -v name 'step_%08d' "$step"
    [[ $SLURM_PROCID = 0 ]] || return 0
    mkdir -p "$run/checkpoints/$name"
    echo '{}' >"$run/checkpoints/$name/manifest.json"
    echo "$name" >"$run/checkpoints/latest"
}
echo "rank $SLURM_PROCID goes on from step $step"
while :; do
    if [[ -n $asked || -e $run/stop ]]; then
        sleep "$saves_s" || : # a signal reaches it, too
        save
        sleep 0.5 # so that the other ranks see the file before it goes
        mv "$run/stop" "$run/logs/stop_answered" 2>/dev/null || :
        exit 75
    fi
    if [[ $step = "${fails#*@}" && ($resumed -lt $step || $step = 0) ]]; then
        [[ ${fails%@*} != 137 ]] || kill -KILL $$
        [[ -z ${BARK:-} ]] || echo "$BARK" >"$run/logs/stacks_rank_0000$SLURM_PROCID.txt"
        exit "${fails%@*}"
    fi
    if [[ $step = "$eats" && $resumed -lt $step ]]; then
        printf -v food '%*s' 300000000 ''
        sleep 60
        echo "${#food} bytes were not too many"
    fi
    while [[ $step = "$hangs" && $resumed -lt $step ]]; do
        sleep 1 || :
    done
    if [[ $step = "$steps" ]]; then
        save
        exit 0
    fi
    sleep 0.1 || : # a signal reaches it, too
    step=$((step + 1))
    ((step % 5)) || save
done
