#!/usr/bin/env bash
# One rank of the trainer, a task of an srun. Usage: rank.sh COMMAND...
#
# Tells the command its place in the variables that torchrun would set, sends it SIGTERM when CODES/stop appears, and writes its exit code
# into CODES/RANK: srun's own code is the highest of all ranks, and one killed rank would hide what the others say. Without its slurmstepd
# it does not live on.
set -uo pipefail

if [[ -n ${SITE:-} ]]; then
    # shellcheck disable=SC1090
    set +u && source "$SITE" # modules and conda read unset variables
    set -u
fi
cd "$ROOT" || exit 2 # a container begins elsewhere
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
trap : TERM INT USR1 # Slurm signals the command as well, and it decides

"$@" &
child=$!
# The file asks the command alone to stop: a signal to the step would end its helpers, such as wandb's, in the middle of a step.
(
    trap - TERM INT USR1
    [[ -d /proc/$PPID ]] && watched=1 || watched= # in a container with process numbers of its own there is nothing to watch
    told=
    while kill -0 "$child"; do
        [[ -z $watched || -d /proc/$PPID ]] || kill -KILL "$child"
        [[ -n $told || ! -e $CODES/stop ]] || { told=1 && kill -TERM "$child"; }
        sleep 1
    done
) 2>/dev/null &
watcher=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a trapped signal ends wait early
    code=0
    wait "$child" || code=$?
done
kill "$watcher" 2>/dev/null
echo "$code" >"$CODES/$RANK.tmp" && mv "$CODES/$RANK.tmp" "$CODES/$RANK"
exit "$code"
