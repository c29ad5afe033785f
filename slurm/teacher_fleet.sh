#!/usr/bin/env bash
# A fleet of judge servers of its own, which several runs share. Its servers stand in FLEET_FILE as long as they generate.
#
#   TEACHER_MODEL=/models/judge FLEET_FILE=/shared/fleet.txt sbatch slurm/teacher_fleet.sh
#   TEACHER_REPLICAS_FILE=/shared/fleet.txt TEACHER_API_KEY_FILE=/shared/fleet.txt.key TEACHER_MODEL=/models/judge \
#       ... sbatch --nodes=8 slurm/scratch_1b.sh
#
# Several fleets of one model may share a FLEET_FILE: each keeps its own addresses in FLEET_FILE.d. When the job ends they are taken out; it
# runs until it is cancelled. DRY_RUN=1 bash slurm/teacher_fleet.sh prints what would run.
#SBATCH --job-name=teacher_fleet
#SBATCH --nodes=8
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -Eeuo pipefail

: "${JUDGE_NODES:=8}"                                   # nodes of the fleet: sbatch --nodes
: "${GPUS_PER_NODE:=8}"                                 # GPUs of a node
: "${TEACHER_MODEL:=teacher}"                           # folder of the post-trained model
: "${FLEET_FILE:=fleet.txt}"                            # addresses, on the shared file system; the key is FLEET_FILE.key

ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $ROOT/slurm/training.sh ]] || { echo "error: ROOT=$ROOT is not the repository; submit from there or set ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
# shellcheck source=slurm/servers.sh
source "$ROOT/slurm/servers.sh"

setting GPUS_PER_NODE 8 count "GPUS of a node; 0: on CPUs"
setting TEACHER_MODEL teacher folder "folder of the post-trained model"
setting FLEET_FILE fleet.txt needed "file for the addresses, on the shared file system"
settings_of_judges 8
((JUDGE_NODES > 0)) || fail "JUDGE_NODES=0 is no fleet"
settings_of_site
FLEET_FILE=$(absolute "$FLEET_FILE")

# FLEET_FILE: the addresses of all fleets that share it. Two that write at once write the same, a moment later.
publish() {
    local all
    all=$(cat "$FLEET_FILE".d/* 2>/dev/null || true)
    [[ $all == "$(cat "$FLEET_FILE" 2>/dev/null || true)" ]] || write "$FLEET_FILE" "$all"
}

# Addresses of fleets that were killed without a word: somebody else may listen there by now.
forget_ended() {
    local running file
    running=$(squeue -h --user="$(id -un)" -t RUNNING,COMPLETING,SUSPENDED -o ' %A ') || return 0
    for file in "$FLEET_FILE".d/*; do
        [[ ! -O $file || $running == *" ${file##*/} "* ]] || { say "taking out the servers of job ${file##*/}, which has ended" && rm -f "$file"; }
    done
}

withdraw() {
    rm -f "$REPLICAS_FILE"
    publish
    stop_servers
}

main() {
    catch_signals
    job_ids
    ports
    assign_nodes judge "$JUDGE_NODES"
    TEACHER_API_KEY_FILE=$FLEET_FILE.key REPLICAS_FILE=$FLEET_FILE.d/${SLURM_JOB_ID:-JOB}
    begin_attempt "$FLEET_FILE.jobs/${SLURM_JOB_ID:-JOB}"
    catch_faults
    plan_servers
    FILES=$ATTEMPT/files.txt
    phase check "nodes"
    if [[ -z ${DRY_RUN:-} ]]; then
        mkdir -p "$FLEET_FILE.d"
        rm -f "$REPLICAS_FILE"
        echo "$TEACHER_MODEL/config.json" >"$FILES"
        trap withdraw EXIT
        forget_ended
        publish
    fi
    start_guard
    check_nodes
    start_servers
    [[ -z ${DRY_RUN:-} ]] || return 0
    wait_for_servers
    rm -f "$STATE/again-early" "$STATE/again-fault"
    phase serve "give runs TEACHER_REPLICAS_FILE=$FLEET_FILE TEACHER_API_KEY_FILE=$FLEET_FILE.key TEACHER_MODEL=$TEACHER_MODEL"
    while :; do
        [[ -z $ENDING$DRAIN ]] || withdraw
        [[ -z $ENDING ]] || leave "$ENDING"
        [[ -z $DRAIN ]] || requeue "$DRAIN"
        tend_servers
        [[ -n $LISTED ]] || rm -f "$REPLICAS_FILE"
        publish
        pause 1
    done
}

main
