#!/usr/bin/env bash
# One rank of the trainer, a task of an srun. Usage: rank.sh COMMAND...
#
# Tells the command its place in the variables that torchrun would set, and writes its exit code into CODES/RANK: srun's own code is the
# highest of all ranks, and one killed rank would hide what the others say. Without its slurmstepd it does not live on.
set -uo pipefail

if [[ -n ${SITE:-} ]]; then
    # shellcheck disable=SC1090
    source "$SITE"
fi
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
trap : TERM INT USR1 # Slurm signals the command as well, and it decides

"$@" &
child=$!
watcher=
if [[ -d /proc/$PPID ]]; then # in a container with process numbers of its own there is nothing to watch
    (
        trap - TERM INT USR1
        while [[ -d /proc/$PPID ]]; do sleep 2; done
        kill -KILL "$child"
    ) 2>/dev/null &
    watcher=$!
fi
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a trapped signal ends wait early
    code=0
    wait "$child" || code=$?
done
[[ -z $watcher ]] || kill "$watcher" 2>/dev/null
echo "$code" >"$CODES/$RANK.tmp" && mv "$CODES/$RANK.tmp" "$CODES/$RANK"
exit "$code"
