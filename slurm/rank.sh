#!/usr/bin/env bash
# One rank: runs the command and writes its exit code to the folder METALM_CODES.
#
# torchrun ends with 1 whatever its workers end with, and srun with the highest code of its tasks, of which
# some it has killed itself. Who decides on a restart needs each rank's own code; a file also tells of a rank
# that the kernel has killed, which could not write it itself.
#
# "Stopped after saving" (75) is reported to the launchers as success: for any other code they end the ranks that
# are still at work, and all ranks have agreed to stop.
set -u

trap : TERM INT USR2 # the rank decides how it ends; this shell only waits for it
"$@"
code=$?
rank=${RANK:-${SLURM_PROCID:?}}
record=$METALM_CODES/rank_$(printf '%05d' "$rank")
printf '%s %s %s\n' "$code" "$(date +%s.%N)" "$(hostname)" >"$record.partial" && mv "$record.partial" "$record"
[[ $code = 75 ]] && exit 0
exit "$code"
