#!/usr/bin/env bash
# Two runs side by side on held-out prefixes: the newest checkpoints (or those of STEP) are exported, then compared by tools/evaluate.py.
#
#   RUN=/shared/runs/scratch_1b AGAINST=/shared/runs/ntp_1b sbatch slurm/evaluate.sh
#
# RUN and AGAINST are run folders, or Hugging Face folders of tools/export_hf.py. The run's own judges are asked where there are servers for
# them (TEACHER_URLS); a model that is to judge here is OVERRIDES='teacher.model=DIR' with TEACHER=local. DRY_RUN=1 prints what would run.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -Eeuo pipefail

ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $ROOT/slurm/common.sh ]] || { echo "error: ROOT=$ROOT is not the repository; submit from there or set ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"

setting RUN "" folder "folder of the run, or of its export"
setting AGAINST "" folder "folder of the run that it is compared with, e.g. its next-token twin, or of its export"
setting STEP_OF_RUN 0 count "step of the checkpoints to export; 0: the newest"
setting CONFIG "" maybe_file "configuration with data, seed and judges; empty: RUN/run.yaml"
setting OUTPUT "" text "report; empty: RUN/evaluation.json, which tools/report.py shows"
setting GPUS_PER_NODE 1 count "0: on CPUs"
setting PAIRS 1000 positive "held-out pairs"
setting TEMPERATURE 0 text "of the continuations; 0 is greedy"
setting TEACHER none "none|urls|local" "who judges besides sentence embeddings: nobody, the servers of TEACHER_URLS, or servers on this node"
setting TEACHER_URLS "" text "addresses of running servers, separated by spaces; their key is SIP_TEACHER_API_KEY or in TEACHER_API_KEY_FILE"
setting TEACHER_API_KEY_FILE "" maybe_file "file with their key"
setting OVERRIDES "" text "more section.key=value, separated by spaces, quoted as in a shell"
settings_of_site
[[ -n ${SLURM_JOB_ID:-} || -n ${DRY_RUN:-} ]] || fail "submit this with sbatch, or look at it with DRY_RUN=1"
[[ $TEMPERATURE =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "TEMPERATURE=$TEMPERATURE is no number: of the continuations; 0 is greedy"
key_file "$TEACHER_API_KEY_FILE"
[[ $TEACHER != urls || -n $TEACHER_URLS ]] || fail "TEACHER=urls needs TEACHER_URLS"
TEACHER_URLS=$(words "$TEACHER_URLS")
CONFIG=$(absolute "${CONFIG:-$RUN/run.yaml}") OUTPUT=$(absolute "${OUTPUT:-$RUN/evaluation.json}")
[[ -f $CONFIG ]] || fail "CONFIG=$CONFIG is no file: an export has none, give that of its run"

# exported FOLDER: sets EXPORTED to the Hugging Face folder of a run, made if need be.
exported() {
    local found
    EXPORTED=$1
    [[ ! -f $1/model.safetensors && ! -f $1/config.json ]] || return 0
    if ((STEP_OF_RUN > 0)); then
        found=$(printf '%s/checkpoints/iter_%07d' "$1" "$STEP_OF_RUN")
    else
        found=$(find "$1/checkpoints" -maxdepth 1 -type d -name 'iter_*' 2>/dev/null | sort | tail -n 1 || true)
    fi
    [[ -n $found && -d $found ]] || fail "${found:-$1/checkpoints/iter_...} is not there: $1 is neither a run with such a checkpoint nor an export"
    EXPORTED=$1/hf_${found##*/}
    [[ ! -d $EXPORTED ]] || return 0
    phase export "$found to $EXPORTED"
    run "$PYTHON" "$ROOT/tools/export_hf.py" "$found" --output "$EXPORTED" || fail "$found could not be exported, see above"
}

cd "$ROOT"
exported "$RUN"
first=$EXPORTED
exported "$AGAINST"
command=("$PYTHON" "$ROOT/tools/evaluate.py" "$first" --against "$EXPORTED" --config "$CONFIG" --pairs "$PAIRS" --temperature "$TEMPERATURE"
    --device "$([[ $GPUS_PER_NODE == 0 ]] && echo cpu || echo cuda)" --output "$OUTPUT.tmp")
case $TEACHER in
none) command+=(--no-judge) ;;
urls)
    # shellcheck disable=SC2206 # several addresses
    command+=(--teacher-url $TEACHER_URLS)
    [[ -z $TEACHER_API_KEY_FILE ]] || command+=("teacher.api_key_file=$TEACHER_API_KEY_FILE")
    ;;
local) command+=("teacher.urls=[]" "teacher.replicas_file=null" "teacher.api_key_file=null") ;;
esac
split_overrides
command+=("${MORE[@]}")
phase evaluate "$first against $EXPORTED on $PAIRS held-out pairs"
run "${command[@]}" || fail "the comparison did not finish, see above; the exports stay, submit again to go on"
[[ -n ${DRY_RUN:-} ]] || mv "$OUTPUT.tmp" "$OUTPUT"
phase "done" "written to $OUTPUT"
