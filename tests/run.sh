#!/usr/bin/env bash
# Installs what the tests need and runs all of them; arguments go to pytest: bash tests/run.sh tests/objective -k dpo
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SIP_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

SIP_VENV=$venv bash "$root/examples/install.sh" cpu,serve-cpu,eval,data,dev
cd "$root"
# Compiling pieces of Megatron costs minutes on a CPU and changes no result.
export TORCHDYNAMO_DISABLE=1
export PATH=$venv/bin:$PATH
exec "$venv/bin/python" -m pytest "$@"
