#!/usr/bin/env bash
# The twin of scratch_1b.sh: the same pairs in the same order, model and schedule, next-token prediction alone; it asks no teacher.
#
#   BLEND=tokens/redpajama_blend.yaml RUN_DIR=/shared/runs/ntp_1b sbatch slurm/scratch_1b_ntp.sh
#
# DRY_RUN=1 bash slurm/scratch_1b_ntp.sh prints what would run. Variables, sites, messages: slurm/README.md
#SBATCH --job-name=scratch_1b_ntp
#SBATCH --nodes=8
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -Eeuo pipefail

: "${TRAINER_NODES:=8}"                                 # nodes that train: sbatch --nodes
: "${GPUS_PER_NODE:=8}"                                 # one rank a GPU
: "${CONFIG:=configs/ntp_1b.yaml}"                      # the preset
: "${RUN_DIR:=runs/ntp_1b}"                             # on the shared file system
default_judge_nodes=0

ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $ROOT/slurm/training.sh ]] || { echo "error: ROOT=$ROOT is not the repository; submit from there or set ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
# shellcheck source=slurm/servers.sh
source "$ROOT/slurm/servers.sh"
# shellcheck source=slurm/training.sh
source "$ROOT/slurm/training.sh"

settings_of_training "$CONFIG" "$RUN_DIR" "$default_judge_nodes"
run_training
