#!/usr/bin/env bash
# Train a judge or a rewriter with GRPO, 500 steps. TASK says which; a rewriter is scored by a judge, whose servers run beside the trainer.
#
#   TASK=judge INIT_FROM=/models/llama DATA=/shared/teacher_data RUN_DIR=/shared/runs/judge sbatch --nodes=8 slurm/train_teacher.sh
#   TASK=rewriter INIT_FROM=/models/llama DATA=/shared/teacher_data TEACHER_MODEL=/models/judge RUN_DIR=/shared/runs/rewriter \
#       sbatch slurm/train_teacher.sh
#
# INIT_FROM is the Hugging Face folder of a post-trained Llama, DATA a folder of tools/build_teacher_data.py. Afterwards: tools/export_hf.py
# RUN_DIR/checkpoints/iter_0000500. DRY_RUN=1 bash slurm/train_teacher.sh prints what would run. Variables, sites, messages: slurm/README.md
#SBATCH --job-name=train_teacher
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

: "${TASK:=judge}"                                      # judge or rewriter
: "${INIT_FROM:=${TASK}_init}"                          # the post-trained model to start from
: "${DATA:=teacher_data}"                               # folder with train.jsonl and valid.jsonl
: "${TRAINER_NODES:=8}"                                 # nodes that train
: "${GPUS_PER_NODE:=8}"                                 # one rank a GPU
: "${CONFIG:=configs/train_$TASK.yaml}"                 # the preset
: "${RUN_DIR:=runs/train_$TASK}"                        # on the shared file system
: "${TEACHER_MODEL:=}"                                  # TASK=rewriter: folder of the judge
default_judge_nodes=8                                   # JUDGE_NODES of TASK=rewriter, unless there is an external fleet
[[ $TASK != judge ]] || default_judge_nodes=0

ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $ROOT/slurm/training.sh ]] || { echo "error: ROOT=$ROOT is not the repository; submit from there or set ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
# shellcheck source=slurm/servers.sh
source "$ROOT/slurm/servers.sh"
# shellcheck source=slurm/training.sh
source "$ROOT/slurm/training.sh"

setting TASK judge "judge|rewriter" "what is trained"
setting DATA teacher_data folder "folder of tools/build_teacher_data.py"
settings_of_training "$CONFIG" "$RUN_DIR" "$default_judge_nodes"
DATA=$(absolute "$DATA")
[[ -d $INIT_FROM ]] || fail "INIT_FROM=$INIT_FROM is no folder on $(hostname): give the Hugging Face folder of a post-trained Llama"
for name in train valid; do
    [[ -f $DATA/$name.jsonl ]] || fail "DATA=$DATA has no $name.jsonl: make it with tools/build_teacher_data.py --output"
done
OVERRIDES="$(printf '%q ' "data.tokenizer_model=$INIT_FROM" "grpo.data=[$DATA/train.jsonl]" "grpo.validation=[$DATA/valid.jsonl]")$OVERRIDES"
run_training
