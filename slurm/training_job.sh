# A training job from its start to its end: what pretrain.sbatch and finetune.sbatch share.
#
# Ten minutes before the time limit Slurm signals the batch shell, which asks the ranks to stop by the run's stop
# file; they save, and the job is queued again. So it is after a fault, an out-of-memory kill, a hang, a lost
# node, or a node that failed its preflight, until it has started METALM_MAX_STARTS times without a new
# checkpoint. Sourced by the templates, which set `root` and `template`; not for use alone.
# shellcheck shell=bash

: "${root:?}" "${template:?}"
restart=${SLURM_RESTART_COUNT:-0}
chain=${METALM_CHAIN:-$SLURM_JOB_ID} # the first job of this one and its predecessors
max_starts=${METALM_MAX_STARTS:-3}
warned='' told_to_end='' child='' cut_short=''

main() {
    trap on_warning USR2
    trap on_end TERM
    (($# > 0)) || give_up "$EXIT_USAGE" "usage: sbatch slurm/$template PIPELINE [section.key=value...]"
    local plan code options=() setting
    for setting in METALM_PREFLIGHT METALM_SBATCH_OPTIONS; do
        words_of "${!setting:-}" >/dev/null || give_up "$EXIT_USAGE" "$setting has a quote that does not end: ${!setting}"
    done
    [[ -z ${METALM_STAGE:-} ]] || options+=(--without-data) # the ranks look when the data are there
    plan=$(run_python -m metalm train "$@" --dry-run --ranks $((SLURM_JOB_NUM_NODES * $(ranks_per_node))) "${options[@]}")
    code=$?
    if ((code != 0)); then
        refused $code "$plan"
    fi
    ((restart > 0)) || echo "$plan"
    [[ $template != finetune.sbatch ]] || refuse_without_weights "$plan"
    run_folder=$(value_of "$plan" 'run folder')
    local holder
    holder=$(value_of "$plan" 'held by')
    [[ -z $holder ]] || give_up "$EXIT_USAGE" "the run $run_folder is held by $holder"
    attempts=$run_folder/logs/attempts.jsonl
    stop_file=$run_folder/stop
    answered=$run_folder/logs/stop_answered # where the ranks have moved the stop file that they have ended for
    mkdir -p "$run_folder/logs" || give_up "$EXIT_USAGE" "cannot write to $run_folder"
    refuse_if_asked_to_stop
    refuse_if_stuck

    export METALM_CODES=$run_folder/logs/exit_codes/$SLURM_JOB_ID.$restart
    bad_nodes=$METALM_CODES/bad_nodes
    mkdir -p "$METALM_CODES"
    record_start
    check_nodes
    code=$?
    if ((code == 0)); then
        stage
        code=$?
    fi
    if ((code == 0)); then
        : >"$METALM_CODES/began"
        watch_for_hang &
        local watch=$!
        launch train "$@"
        code=$?
        kill "$watch" 2>/dev/null
    fi
    finish "$code" "$@"
}

# A run that was started before has its records: what keeps it from starting again stands there, too.
refused() { # CODE PLAN
    run_folder=$(value_of "$2" 'run folder')
    attempts=$run_folder/logs/attempts.jsonl
    [[ -z $run_folder || ! -e $attempts ]] || record_end "$1" "refused before it started: see the job's log" no
    give_up "$1" "the run cannot be started"
}

# Start ranks and wait for them, through all signals.
launch() { # METALM_ARGUMENTS...
    local code
    "$root/slurm/launch.sh" "$@" &
    child=$!
    [[ -z $warned ]] || ask_to_stop
    cut_short=yes
    while [[ -n $cut_short ]]; do # by a signal; the code of a child that has ended meanwhile is still known
        cut_short=''
        wait "$child"
        code=$?
    done
    return "$code"
}

# A rank per GPU as in training, but by srun alone, which needs no rendezvous of its own.
check_nodes() {
    [[ ${METALM_PREFLIGHT:-} != no ]] || return 0
    local options=() code
    mapfile -d '' -t options < <(words_of "${METALM_PREFLIGHT:-}")
    METALM_LAUNCHER=srun launch preflight "$run_folder" --gpus "${SLURM_GPUS_ON_NODE:-0}" \
        --bad-nodes "$bad_nodes" "${options[@]}"
    code=$?
    ((code != 0)) || rm -f "$METALM_CODES"/*
    return "$code"
}

# Copy data to the nodes' own disks. Starting again cannot mend what METALM_STAGE says; all else may be a node's fault.
stage() {
    [[ -n ${METALM_STAGE:-} ]] || return 0
    local code
    say "copying $METALM_STAGE"
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$root/slurm/stage.sh"
    code=$?
    ((code != 0)) || return 0
    echo "the data could not be copied to the nodes' disks: see the job's log" >"$METALM_CODES/cause"
    ((code == EXIT_USAGE)) || code=$EXIT_NODE
    return "$code"
}

# The last lines of the dry run are for this script, a name and a value each. They are never evaluated.
value_of() { # PLAN NAME
    sed -n "s/^$2: //p" <<<"$1" | tail -n 1
}

refuse_without_weights() { # PLAN
    [[ $(value_of "$1" 'initial weights') != none ]] ||
        give_up "$EXIT_USAGE" "nothing to start from: give initialize.decoder=RUN, initialize.encoders=RUN or both"
}

# shellcheck disable=SC2329  # by its trap
on_warning() {
    warned=yes cut_short=yes
    say "the time limit is near"
    [[ -z $child ]] || ask_to_stop
}

# shellcheck disable=SC2329  # by its trap
on_end() {
    told_to_end=$(date +%s) cut_short=yes
    # Ranks whose peers are gone cannot save, and would be waited for until Slurm ends this shell as well.
    [[ -z $child || -z $(down_nodes) ]] || kill -KILL "$child"
}

# Unless an operator has: their file would bring the job back as its own one does.
ask_to_stop() {
    say "asking the ranks to stop by $stop_file"
    (set -o noclobber && echo "job $SLURM_JOB_ID" >"$stop_file") 2>/dev/null || [[ -e $stop_file ]] ||
        say "error: cannot write $stop_file" >&2
}

# The operator who has asked to stop, if one has. Takes the files away, each before it is read, as an operator may
# write at any time; those of jobs count for nothing.
operator_of() { # STOP_FILES...
    local file taken asker operator=''
    for file in "$@"; do
        taken=$run_folder/logs/stop_taken.$SLURM_JOB_ID
        mv "$file" "$taken" 2>/dev/null || continue
        asker=$(cat "$taken")
        rm -f "$taken"
        [[ $asker = job\ * ]] || operator=${asker:-by the stop file}
    done
    echo "$operator"
}

# The newest step that a restart would go on from: of a folder with a manifest, as the trainer sees it.
checkpoint_step() {
    local manifest folder newest=0
    for manifest in "$run_folder"/checkpoints/step_*/manifest.json; do
        folder=${manifest%/*}
        [[ -s $manifest && ${folder##*/} =~ ^step_([0-9]{8,18})$ ]] || continue
        ((10#${BASH_REMATCH[1]} <= newest)) || newest=$((10#${BASH_REMATCH[1]}))
    done
    echo "$newest"
}

# A stop file that an operator wrote while the job was waiting holds; so does one that the ranks of its last start have
# ended for, when this script was killed before it could say so. One that a job wrote does not.
refuse_if_asked_to_stop() {
    ((restart > 0)) || rm -f "$answered" # of another job
    local operator
    operator=$(operator_of "$answered" "$stop_file")
    [[ -n $operator ]] || return 0
    record_end "$EXIT_RESTART" "asked to stop before it started: $operator" no
    give_up "$EXIT_RESTART" "asked to stop ($operator): not starting"
}

# Starts of this job and its predecessors from the step that the next start would go on from.
starts_without_progress() {
    grep -c "\"event\": \"start\".*\"chain\": \"$chain\".*\"step\": $(checkpoint_step)}" "$attempts" 2>/dev/null
}

refuse_if_stuck() {
    local starts
    starts=$(starts_without_progress)
    if ((starts >= max_starts)); then
        give_up "$EXIT_FAULT" "started $starts times from step $(checkpoint_step) without a new checkpoint"
    fi
}

record_start() {
    printf '{"event": "start", "time": %s, "job": "%s", "restart": %d, "nodes": "%s", "ranks": %d, "chain": "%s", "step": %d}\n' \
        "$(date +%s)" "$SLURM_JOB_ID" "$restart" "$SLURM_JOB_NODELIST" \
        $((SLURM_JOB_NUM_NODES * $(ranks_per_node))) "$chain" "$(checkpoint_step)" >>"$attempts"
}

record_end() { # CODE CAUSE AGAIN
    local comes_back=true cause=${2%%$'\n'*} # which a user's stop file or an error may have written
    cause=${cause//[[:cntrl:]\"\\]/}
    [[ $3 != no ]] || comes_back=false
    printf '{"event": "end", "time": %s, "job": "%s", "restart": %d, "code": %d, "cause": "%s", "comes_back": %s, "step": %d}\n' \
        "$(date +%s)" "$SLURM_JOB_ID" "$restart" "$1" "$cause" $comes_back "$(checkpoint_step)" >>"$attempts"
    say "$cause; newest checkpoint: step $(checkpoint_step)"
}

# End the ranks when neither metrics nor checkpoints have moved for too long.
watch_for_hang() {
    local minutes=${METALM_HANG_MINUTES:-60} patience began newest step
    patience=$(awk "BEGIN { print int($minutes * 60) }")
    ((patience > 0)) || return 0
    began=$(date +%s)
    while sleep $((patience > 60 ? 20 : patience / 3 + 1)); do
        newest=$(stat --format=%Y "$run_folder/logs/metrics.jsonl" "$run_folder"/checkpoints/* 2>/dev/null | sort -n | tail -n 1)
        newest=$((${newest:-0} > began ? newest : began))
        if (($(date +%s) - newest > patience)); then
            say "no step for $minutes minutes: ending the ranks"
            : >"$METALM_CODES/hung"
            # The step alone: a signal to the job would end this script as well. Slurm sends TERM, then KILL.
            step=$(squeue --noheader --steps --job="$SLURM_JOB_ID" --format=%i | grep -E '\.[0-9]+$' | sort -V | tail -n 1)
            scancel "$step"
            return
        fi
    done
}

finish() { # CODE METALM_ARGUMENTS...
    local code=$1 cause found
    shift
    cause=$(cat "$METALM_CODES/cause" 2>/dev/null) || cause="the launcher ended with $code"
    [[ ! -e $METALM_CODES/hung ]] || cause="no step for ${METALM_HANG_MINUTES:-60} minutes"
    local operator # also one who has asked too late for the ranks
    operator=$(operator_of "$answered" "$stop_file")
    if [[ -e $METALM_CODES/began ]]; then # the trainer's own watchdog leaves a note beside the ranks' stacks
        found=$(find "$run_folder/logs" -name 'stacks_rank_*.txt' -newer "$METALM_CODES/began" | sort | head -n 1)
        [[ -z $found ]] || cause=$(head -n 1 "$found")
    fi
    local faults num_bad=0 leave_out=''
    if [[ -s $bad_nodes ]]; then
        faults=$(sed 's/\t/: /' "$bad_nodes" | paste -s -d '|' | sed 's/|/, /g')
        leave_out=$(cut -f 1 "$bad_nodes" | paste -s -d ,)
        num_bad=$(wc -l <"$bad_nodes")
        cause="failed the preflight: $faults"
    fi
    rm -rf "$METALM_CODES"
    # yes: this script queues the job again; slurm: Slurm does, or has done so; no.
    local again=yes facts restarts
    facts=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null)
    restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<<"$facts")
    if ((code == 0 || code == EXIT_USAGE || code == EXIT_DATA)); then
        again=no
    elif ((code == EXIT_NODE && num_bad >= SLURM_JOB_NUM_NODES)); then
        cause+=" (no node is left)" again=no
    elif ((${restarts:-0} > restart)); then
        cause="queued again by Slurm$(down_nodes)" again=slurm
        [[ -z $operator ]] || echo "$operator" >"$stop_file" # for the next start
    elif [[ -n $operator ]]; then
        ((code != EXIT_RESTART)) || cause='' # the ranks' common end
        cause+="${cause:+, }asked to stop: $operator" again=no
    elif [[ $facts = *PreemptTime=[0-9]* ]]; then
        cause=preempted
    elif [[ -n $told_to_end && (-z $warned || $told_to_end -lt ${SLURM_JOB_END_TIME:-0}) ]]; then
        cause=cancelled again=no
    elif [[ -n $warned ]]; then
        cause="time limit"
        ((code == EXIT_RESTART)) || cause="time limit, before the ranks had saved"
    elif ((code == EXIT_RESTART)); then
        cause="stopped by itself or by a signal" # as with training.time_limit_minutes
    fi
    if [[ $again = yes && ${METALM_COME_BACK:-requeue} = never ]]; then
        again=no
    elif [[ $again = yes ]] && (($(starts_without_progress) >= max_starts)); then
        cause+=", $max_starts starts without a new checkpoint" again=no
    fi
    record_end "$code" "$cause" "$again"
    [[ $again != yes ]] || come_back "$(nodes_to_leave_out "$facts" "$leave_out")" "$@"
    exit "$code"
}

# Nodes of this job that are gone, as ": lost NODES". On those that drain, or are expected to fail, it still runs.
down_nodes() {
    local nodes
    nodes=$(sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --states=down --format=%N 2>/dev/null)
    [[ -z $nodes ]] || echo ": lost $nodes"
}

# The nodes that the job had left out before, and those that it leaves out now.
nodes_to_leave_out() { # FACTS NODES
    local before
    before=$(sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' <<<"$1")
    [[ $before != '(null)' ]] || before=''
    echo "$before${before:+${2:+,}}$2"
}

# In a shell that outlives Slurm's SIGTERM: it goes to the whole job as soon as the job is queued again. The job
# starts again when this script has ended, which is later than the update.
queue_again() ( # NODES_TO_LEAVE_OUT
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" || return
    [[ -z $1 ]] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$1" || say "error: $1 is not left out" >&2
)

come_back() { # NODES_TO_LEAVE_OUT METALM_ARGUMENTS...
    local leave_out=$1
    shift
    if [[ ${METALM_COME_BACK:-requeue} = requeue ]] && queue_again "$leave_out"; then
        say "queued again${leave_out:+ without $leave_out}"
        sleep 60 & # Slurm ends this script
        wait
        return
    fi
    local options=(--nodes="$SLURM_JOB_NUM_NODES" --job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION")
    options+=(--dependency="afterany:$SLURM_JOB_ID" --time="$(squeue --noheader --job="$SLURM_JOB_ID" --format=%l)")
    [[ -z $leave_out ]] || options+=(--exclude="$leave_out")
    [[ -z ${SLURM_JOB_ACCOUNT:-} ]] || options+=(--account="$SLURM_JOB_ACCOUNT")
    [[ -z ${SLURM_GPUS_PER_NODE:-} ]] || options+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
    local more=()
    mapfile -d '' -t more < <(words_of "${METALM_SBATCH_OPTIONS:-}")
    METALM_CHAIN=$chain METALM_ROOT=$root sbatch "${options[@]}" "${more[@]}" "$root/slurm/$template" "$@" || say "error: no successor could be submitted" >&2
}

main "$@"
