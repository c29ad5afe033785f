#!/usr/bin/env bash
# One vLLM server, a step of its own. Usage: server.sh READY_FILE URL GPUS FIRST_GPU COMMAND...
#
# READY_FILE appears, with the URL in it, when the server has generated a token; when it ends, READY_FILE goes and READY_FILE.ended appears: an
# srun whose slurmstepd was killed waits for ever. The key comes from KEY_FILE.
# The server ends with everything it started when this script is told to stop, or when its slurmstepd is gone.
set -uo pipefail

ready=$1 url=$2 gpus=$3 first=$4
shift 4
if [[ -n ${SITE:-} ]]; then
    # shellcheck disable=SC1090
    set +u && source "$SITE" # modules and conda read unset variables
    set -u
fi
cd "$ROOT" || exit 2 # a container begins elsewhere
SIP_TEACHER_API_KEY=$(<"$KEY_FILE") || exit 2
export SIP_TEACHER_API_KEY
if ((gpus > 0)); then
    IFS=, read -ra mine <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((first + gpus - 1)))}"
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]:first:gpus}")
    export CUDA_VISIBLE_DEVICES
fi

stopping=
stop() {
    stopping=1
    kill -TERM "$keeper" 2>/dev/null
}
trap 'rm -f "$ready" && : >"$ready.ended"' EXIT
"$PYTHON" "$ROOT/megatron_sip/process_group.py" $$ "$@" &
keeper=$!
trap stop TERM INT
trap : USR1

watch=
[[ ! -d /proc/$PPID ]] || watch=1
missed=0 next=0 # a server that has generated is asked again every minute
while kill -0 "$keeper" 2>/dev/null; do
    if [[ -z $stopping ]] && ((SECONDS >= next)); then
        if "$PYTHON" "$ROOT/slurm/preflight.py" generates "$url" "$MODEL" 2>/dev/null; then
            [[ -f $ready ]] || echo "[$(date '+%F %T')] $url generates"
            echo "$url" >"$ready.tmp" && mv "$ready.tmp" "$ready"
            missed=0 next=$((SECONDS + 60))
        elif [[ -f $ready ]] && ((++missed >= 5)); then
            echo "[$(date '+%F %T')] $url has not generated $missed times in a row; ending it"
            stop
        fi
    fi
    [[ -z $watch || -d /proc/$PPID || -n $stopping ]] || stop
    sleep 1
done
wait "$keeper"
