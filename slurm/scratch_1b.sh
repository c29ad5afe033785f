#!/usr/bin/env bash
# From scratch, 1.4 B parameters, 21,000 steps, NLL + online DPO: the trainer and the judge's servers side by side in one job, requeued until the
# last step is saved. Submit from the repository:
#
#   BLEND=tokens/redpajama_blend.yaml TEACHER_MODEL=/models/judge RUN_DIR=/shared/runs/scratch_1b sbatch slurm/scratch_1b.sh
#
# DRY_RUN=1 bash slurm/scratch_1b.sh prints what would run. Variables, sites, messages: slurm/README.md
#SBATCH --job-name=scratch_1b
#SBATCH --nodes=16
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

# What differs from run to run; `sbatch --nodes` must be the sum of both. All others, with the same defaults: slurm/README.md
: "${TRAINER_NODES:=8}"                                 # nodes that train
: "${GPUS_PER_NODE:=8}"                                 # one rank a GPU
: "${CONFIG:=configs/scratch_1b.yaml}"                  # the preset
: "${RUN_DIR:=runs/scratch_1b}"                         # on the shared file system
: "${TEACHER_MODEL:=teacher}"                           # folder of the post-trained model
default_judge_nodes=8                                   # JUDGE_NODES, unless there is an external fleet: TEACHER_URLS, TEACHER_REPLICAS_FILE

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
