#!/usr/bin/env bash
# RedPajama (or SlimPajama, or any folder of JSONL or Parquet) -> one .bin/.idx dataset for each subset, and a blend.
#
#   INPUT=/data/redpajama OUTPUT_PREFIX=/data/tokens/redpajama TOKENIZER_MODEL=/data/tokenizer.model sbatch slurm/preprocess_redpajama.sh
#
# An array: each task tokenizes a portion of the files, of about equal size. A task that is stopped (time limit, preemption, node failure,
# scontrol requeue) goes on from its last record of progress. The first task submits a job that merges the portions when all are done.
# Several tasks share a node: one reading process feeds about as many workers as a task has CPUs here.
#
# DRY_RUN=1 prints what would run. FLAGS holds more flags of tools/preprocess_data.py, e.g. FLAGS='--min-tokens 256 --drop-duplicates'
# (duplicates are dropped within a portion only; --split-by-hash keeps all copies in the same part).
#SBATCH --job-name=preprocess
#SBATCH --array=0-191
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=1500M
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=preprocess-%A_%a.log
set -Eeuo pipefail

ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}           # the repository: submit from there, or set it
[[ -f $ROOT/slurm/common.sh ]] || { echo "error: ROOT=$ROOT is not the repository; submit from there or set ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"

setting INPUT "" needed "folder or quoted glob of the corpus"
setting OUTPUT_PREFIX "" needed "path and beginning of the names of the datasets"
setting TOKENIZER_MODEL "" file "sentencepiece model file"
setting FLAGS "--append-eod --min-tokens 256" text "more flags of tools/preprocess_data.py"
setting SUBSET_KEY meta.redpajama_set_name needed "key of a document's subset"
setting MERGE 1 switch "0: leave the portions as they are"
setting MERGE_FLAGS --remove text "flags of tools/merge_data.py; the portions are removed when a subset is merged"
settings_of_site
child=

check() {
    [[ -n ${SLURM_JOB_ID:-} || -n ${DRY_RUN:-} ]] || fail "submit this with sbatch, or look at it with DRY_RUN=1"
    compgen -G "$INPUT" >/dev/null || fail "INPUT=$INPUT is not there on $(hostname)"
    [[ -n ${DRY_RUN:-} ]] || mkdir -p "$(dirname "$OUTPUT_PREFIX")" || fail "the folder of OUTPUT_PREFIX=$OUTPUT_PREFIX cannot be made"
}

# Slurm warns before the time limit, and before it takes the node for somebody else.
stop() {
    say "told to stop: saving"
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

tokenize() {
    local first=${SLURM_ARRAY_TASK_MIN:-0} code=0 state
    local shard=$((${SLURM_ARRAY_TASK_ID:-0} - first))/${SLURM_ARRAY_TASK_COUNT:-1}
    if [[ $MERGE == 1 && ${SLURM_ARRAY_TASK_ID:-0} == "$first" && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        say "submitting the job that merges the portions when all are done"
        # shellcheck disable=SC2086 # absent where they are not set
        run sbatch --array=0 ${SLURM_JOB_PARTITION:+--partition=$SLURM_JOB_PARTITION} ${SLURM_JOB_ACCOUNT:+--account=$SLURM_JOB_ACCOUNT} \
            --cpus-per-task=1 --mem-per-cpu=4G --dependency="afterok:${SLURM_ARRAY_JOB_ID:-JOB}" --kill-on-invalid-dep=yes \
            --job-name=merge --output="${MERGE_OUTPUT:-merge-%A.log}" --export=ALL "$ROOT/slurm/preprocess_redpajama.sh" merge ||
            say "warning: it was not taken; submit it when all portions are done: sbatch --array=0 $ROOT/slurm/preprocess_redpajama.sh merge"
    fi
    say "portion $shard on $(hostname), attempt $((${SLURM_RESTART_COUNT:-0} + 1))"
    # shellcheck disable=SC2086 # several flags in one variable
    set -- "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$INPUT" --output-prefix "$OUTPUT_PREFIX" --tokenizer-model "$TOKENIZER_MODEL" \
        --split-by-subset --subset-key "$SUBSET_KEY" --shard "$shard" --workers "${SLURM_CPUS_PER_TASK:-1}" $FLAGS
    if [[ -n ${DRY_RUN:-} ]]; then
        run "$@"
        return
    fi
    trap stop TERM
    "$@" &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a trapped signal ends wait early
        code=0
        wait "$child" || code=$?
    done
    case $code in
    0) say "portion $shard is done" ;;
    143) # saved; a time limit would end this job here
        state=$(job_state)
        # Slurm would bring a cancelled job back.
        [[ $state == RUNNING ]] || { say "saved; the job is $state by now, nothing is requeued from here" && exit 143; }
        say "saved; requeueing"
        ask_requeue || fail "scontrol requeue $SLURM_JOB_ID was refused; is requeueing allowed here? Do it by hand, the portion goes on"
        sleep 300
        fail "requeued 5 minutes ago, and still running"
        ;;
    *) fail "portion $shard ended with code $code, see above; when the cause is gone: scontrol requeue $SLURM_JOB_ID,
and when all portions are done: sbatch --array=0 $ROOT/slurm/preprocess_redpajama.sh merge" ;;
    esac
}

main() {
    check
    if [[ ${1:-} == merge ]]; then
        # shellcheck disable=SC2086
        run "$PYTHON" "$ROOT/tools/merge_data.py" --shards "$OUTPUT_PREFIX" --allow-missing $MERGE_FLAGS
        say "merged: ${OUTPUT_PREFIX}_blend.yaml is ready for base: of a configuration"
    else
        tokenize
    fi
}

main "$@"
