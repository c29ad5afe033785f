#!/usr/bin/env bash
# Installs what the tests need and runs all of them; arguments go to pytest: bash tests/run.sh tests/objective -k dpo
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SIP_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

SIP_VENV=$venv bash "$root/examples/install.sh" cpu,serve-cpu,eval,standard,data,dev
cd "$root"
# Compiling pieces of Megatron costs minutes on a CPU and changes no result.
export TORCHDYNAMO_DISABLE=1
export PATH=$venv/bin:$PATH
(($# == 0)) || exec "$venv/bin/python" -m pytest "$@"

# Slurm's tests mostly wait for queues and servers, so they run beside the others; their output comes at the end.
export SIP_TEST_CACHE=${SIP_TEST_CACHE:-$root/.pytest_cache/sip}
"$venv/bin/python" "$root/examples/fetch_teacher.py" --output "$SIP_TEST_CACHE/teacher"
output=$(mktemp)
env --default-signal=INT "$venv/bin/python" -m pytest -o cache_dir=.pytest_cache/slurm tests/slurm >"$output" 2>&1 &
beside=$!
trap 'kill -INT "$beside" 2>/dev/null || true; wait "$beside" || true; rm -f "$output"' EXIT # by SIGINT pytest stops its Slurm, too
trap 'exit 130' INT TERM
code=0
"$venv/bin/python" -m pytest --ignore=tests/slurm || code=$?
wait "$beside" || code=$?
cat "$output"
exit "$code"
