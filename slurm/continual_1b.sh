#!/usr/bin/env bash
# Continual pretraining of a 1.4 B model, 2,000 steps of online DPO against its frozen start. PRESET says what the judges look at.
#
#   PRESET=quality INIT_FROM=policy_init BLEND=tokens/slimpajama_blend.yaml TEACHER_MODEL=/models/judge RUN_DIR=/shared/runs/quality \
#       sbatch slurm/continual_1b.sh
#
# INIT_FROM is a folder of tools/export_hf.py --from-hf. DRY_RUN=1 bash slurm/continual_1b.sh prints what would run. Variables, sites,
# messages: slurm/README.md
#SBATCH --job-name=continual_1b
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

: "${PRESET:=quality}"                                  # quality, factuality or safety
: "${INIT_FROM:=policy_init}"                           # the model to go on from
: "${TRAINER_NODES:=8}"                                 # nodes that train
: "${GPUS_PER_NODE:=8}"                                 # one rank a GPU
: "${CONFIG:=configs/continual_$PRESET.yaml}"           # the preset's configuration
: "${RUN_DIR:=runs/continual_$PRESET}"                  # on the shared file system
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

setting PRESET quality "quality|factuality|safety" "what the judges look at"
settings_of_training "$CONFIG" "$RUN_DIR" "$default_judge_nodes"
[[ -d $INIT_FROM ]] || fail "INIT_FROM=$INIT_FROM is no folder on $(hostname): make it with tools/export_hf.py --from-hf HF_LLAMA --output DIR"
run_training
