# shellcheck shell=bash
# What all scripts of this folder share: messages, settings with their checks, the log folder of an attempt, steps, requeueing.
# Sourced by scripts that run under set -Eeuo pipefail, after ROOT is set. In: environment variables. Out: functions.

ROOT=$(cd "$ROOT" && pwd)
PHASE=start
ATTEMPT=   # RUN_DIR/slurm/attempt-NNN-JOBID once it exists
DRAIN=     # why the run is to be saved and requeued
PREEMPTED= # the job is preempted
ENDING=    # somebody ends the job (scancel, scontrol requeue): nothing is restarted or requeued
SETTINGS=()
STATE=     # RUN_DIR/slurm, what attempts tell each other
declare -A NODES=([trainer]="" [judge]="" [rollout]="") # names, separated by spaces
declare -A GROUP=()                                     # component of a heterogeneous job

# -- messages -----------------------------------------------------------------------------------------------------

say() {
    local line
    line="[$(date '+%F %T')] $PHASE: $*"
    echo "$line"
    [[ -z $ATTEMPT || -n ${DRY_RUN:-} ]] || echo "$line" >>"$ATTEMPT/job.log" || true # a full disk is no reason to end
}
phase() {
    PHASE=$1
    shift
    say "$*"
}
# Code 2: the same would happen again, so nothing is requeued.
fail() {
    say "error: $*" >&2
    [[ -n ${DRY_RUN:-} || -z $ATTEMPT ]] || record_end "error"
    if declare -F stop_servers >/dev/null; then stop_servers; fi
    exit 2
}
run() { if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }

# -- settings -----------------------------------------------------------------------------------------------------

# setting NAME DEFAULT KIND MEANING: the environment's value or the default, checked. KIND: text, needed, count, positive, switch, file, folder,
# maybe_file, maybe_folder, one|of|these.
setting() {
    local name=$1 kind=$3 meaning=$4 value
    value=${!name-$2}
    [[ $kind != *file && $kind != *folder ]] || value=$(absolute "$value")
    declare -g "$name=$value"
    SETTINGS+=("$name")
    case $kind in
    text) ;;
    needed) [[ -n $value ]] || fail "$name is not set: $meaning" ;;
    count) [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$name=$value is no whole number: $meaning" ;;
    positive) [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || fail "$name=$value is no whole number of at least 1: $meaning" ;;
    switch) [[ $value == [01] ]] || fail "$name=$value is neither 0 nor 1: $meaning" ;;
    file | folder) [[ -n $value ]] || fail "$name is not set: $meaning" ;;&
    file | maybe_file) [[ -z $value || -f $value ]] || fail "$name=$value is no file on $(hostname): $meaning" ;;&
    folder | maybe_folder) [[ -z $value || -d $value ]] || fail "$name=$value is no folder on $(hostname): $meaning" ;;&
    file | maybe_file | folder | maybe_folder) [[ -z $value || -r $value ]] || fail "$name=$value cannot be read by $(id -un): $meaning" ;;
    *"|"*) [[ -n $value && "|$kind|" == *"|$value|"* ]] || fail "$name=$value is none of ${kind//|/, }: $meaning" ;;
    *) fail "$name has the unknown kind $kind" ;;
    esac
}

# split_overrides: sets MORE to the settings in OVERRIDES.
split_overrides() {
    local lines
    MORE=()
    lines=$(xargs -r printf '%s\n' <<<"$OVERRIDES") || fail "OVERRIDES=$OVERRIDES cannot be taken apart; quote as in a shell"
    # shellcheck disable=SC2034 # of the callers
    [[ -z $lines ]] || mapfile -t MORE <<<"$lines"
}

# words TEXT: separated by one space each, also where there were commas.
words() { xargs -r <<<"${1//,/ }"; }

# A path that means the same on every node, from the repository where it is relative.
absolute() { if [[ -z $1 || $1 == /* ]]; then echo "$1"; else echo "$ROOT/$1"; fi; }

settings_of_site() {
    setting PYTHON "$ROOT/.venv/bin/python" text "Python with megatron_sip's dependencies, at the same path on every node"
    setting SITE "" maybe_file "shell file sourced here and on every node before anything else (modules, NCCL_*, GLOO_SOCKET_IFNAME)"
    setting SRUN_FLAGS "" text "more flags of every srun, e.g. --container-image=... --container-mounts=..."
    setting PORT_BASE 0 count "first of 100 ports; 0: by the job's number, from 10000 to 29900"
    setting CHECK_TIMEOUT 300 positive "seconds until every node must have answered the start-up check"
    setting GUARD 1 switch "1: a small waiting job requeues this one when its first node dies; with REQUEUE=0 there is none"
    setting GUARD_FLAGS "" text "flags of sbatch for that job, e.g. --partition=small"
    setting REQUEUE 1 switch "0: leave with 85 instead of requeueing the job"
    # Inside a container this machine may lack PYTHON; the nodes are checked anyway.
    [[ -n $SRUN_FLAGS || -x $PYTHON ]] ||
        fail "PYTHON=$PYTHON is not there on $(hostname); install with: bash examples/install.sh cpu,data (or gpu,serve-gpu)"
    if [[ -n $SITE ]]; then
        set +eu # modules and conda read unset variables and return what they like
        # shellcheck disable=SC1090
        source "$SITE"
        set -eu
    fi
    ((PORT_BASE <= 65435)) || fail "PORT_BASE=$PORT_BASE leaves no room for 100 ports: at most 65435"
    export SITE PYTHON ROOT PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    read -ra SRUN_MORE <<<"$SRUN_FLAGS"
}

show_settings() {
    local name
    for name in "${SETTINGS[@]}"; do
        hidden "$name" "${!name}"
    done
}

# -- secrets ------------------------------------------------------------------------------------------------------

# hidden NAME VALUE: NAME=VALUE, or the value left out where it may be a secret. Names of files with keys are none.
hidden() {
    local name=${1^^} value=$2
    if [[ $name != *_FILE && $name =~ KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE|JWT && $name != TOKENIZER* ]]; then
        value="[hidden]"
    elif [[ $value =~ ://[^/[:space:]]*@ || $value =~ (^|[^a-z])(sk|hf|ghp|gho|github_pat|glpat|xox[a-z])[-_][A-Za-z0-9_-]{10} ||
        $value == *"BEGIN "*"PRIVATE KEY"* ||
        $value =~ eyJ[A-Za-z0-9_-]{10,}\. ||
        ${value,,} =~ (bearer\ |--api-key[=\ ]|[?&]sig=|(key|token|secret|password|passwd)=) ]]; then
        value="[hidden]"
    fi
    printf '%s=%q\n' "$1" "$value"
}

dump_environment() {
    local entry
    while IFS= read -r -d '' entry; do
        hidden "${entry%%=*}" "${entry#*=}"
    done < <(env -0 | sort -z)
}

# -- an attempt ---------------------------------------------------------------------------------------------------

# begin_attempt FOLDER: FOLDER/slurm/attempt-NNN-JOBID for this attempt's logs, and FOLDER/slurm/latest.
begin_attempt() {
    local folder=$1 number=1 last
    STATE=$folder/slurm
    if [[ -n ${DRY_RUN:-} ]]; then
        ATTEMPT=$STATE/attempt-001-${SLURM_JOB_ID:-JOB}
        return
    fi
    mkdir -p "$STATE" || fail "$STATE cannot be made on $(hostname); is it on the shared file system and yours?"
    leave_to_holder
    write "$STATE/job" "$SLURM_JOB_ID"
    last=$(find "$STATE" -maxdepth 1 -name 'attempt-*' | sort -V | tail -n 1)
    [[ -z $last ]] || number=$((10#$(cut -d- -f2 <<<"${last##*/}") + 1))
    ATTEMPT=$STATE/$(printf 'attempt-%03d-%s' "$number" "$SLURM_JOB_ID")
    mkdir "$ATTEMPT" || fail "$ATTEMPT cannot be made"
    ln -sfn "${ATTEMPT##*/}" "$STATE/latest.tmp" && mv -T "$STATE/latest.tmp" "$STATE/latest"
    dump_environment >"$ATTEMPT/environment.txt"
    show_settings >"$ATTEMPT/settings.txt"
    say "attempt $number of job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0}) on $SLURM_JOB_NODELIST; logs in $STATE/latest"
}

# Asked again a moment later: two that begin at once have both seen nobody, and the last to write stays.
leave_to_holder() {
    local holder
    [[ -z ${DRY_RUN:-} ]] || return 0
    holder=$(cat "$STATE/job" 2>/dev/null || true)
    if [[ -n $holder && $holder != "$SLURM_JOB_ID" && -n $(squeue -h -j "$holder" -t RUNNING,COMPLETING,SUSPENDED -o %i 2>/dev/null) ]]; then
        ATTEMPT= # the records are the other's
        fail "job $holder works in ${STATE%/slurm} already; wait for it, cancel it (scancel $holder), or give this job another folder"
    fi
}

# How the attempt ended; only after a requeue a guard is needed on.
record_end() {
    printf '%s %s %s\n' "$(date '+%F %T')" "${ATTEMPT##*/}" "$1" >>"$STATE/attempts.txt"
    [[ $1 == requeue || ! -s $STATE/guard ]] || scancel "$(<"$STATE/guard")" 2>/dev/null || true
}

# A job of its own that requeues this one when the node of this script dies. Without it (GUARD=0, or refused) such a job ends.
start_guard() {
    local id
    [[ $GUARD == 1 && $REQUEUE == 1 && -z ${DRY_RUN:-} ]] || return 0
    id=$(cat "$STATE/guard" 2>/dev/null || true)
    local account=${SLURM_JOB_ACCOUNT:-}
    [[ -z $id || -z $(squeue -h -j "$id" -t PENDING -o %i 2>/dev/null) ]] || return 0
    # shellcheck disable=SC2086 # several flags in one variable
    if id=$(sbatch --parsable ${account:+--account="$account"} --job-name="${SLURM_JOB_NAME:-job}-guard" \
        --dependency="afternotok:$SLURM_JOB_ID" --kill-on-invalid-dep=yes --output="$STATE/guard.log" \
        $GUARD_FLAGS "$ROOT/slurm/guard.sh" "$SLURM_JOB_ID" "$STATE/attempts.txt"); then
        write "$STATE/guard" "${id%%;*}"
    else
        say "warning: the job that requeues this one if $(hostname) dies was refused; set GUARD_FLAGS (partition, account), or GUARD=0"
    fi
}

# key_file FILE: says so where others could use the servers with it.
key_file() {
    [[ -z $1 || -z $(find -L "$1" -maxdepth 0 -perm /077) ]] || say "warning: $1 holds a key and is open to others; chmod 600 $1"
}

# write FILE TEXT: whole or not at all.
write() {
    local aside=${1%/*}/.${1##*/}.tmp-${SLURM_JOB_ID:-}
    printf "%s\n" "$2" >"$aside"
    sync "$aside"
    mv "$aside" "$1"
}

# secret_file FILE: makes a random key, readable for this user alone.
secret_file() {
    [[ -s $1 ]] || (
        umask 077
        head -c 32 /dev/urandom | base64 | tr -d '+/=\n' >"$1.tmp-${SLURM_JOB_ID:-}"
        mv "$1.tmp-${SLURM_JOB_ID:-}" "$1"
    ) || fail "$1 cannot be written"
    chmod 600 "$1"
}

# -- signals and requeueing -----------------------------------------------------------------------------------------

catch_signals() {
    trap 'DRAIN="${DRAIN:-Slurm warned that time is up (SIGUSR1)}"' USR1
    trap 'ENDING="${ENDING:-SIGTERM: the job is cancelled, requeued by hand or out of time}"' TERM
}

# Slurm ends the steps of a preempted job with SIGTERM, and may say nothing to this script.
notice_preemption() {
    if scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | grep -qE ' PreemptTime=[0-9]'; then
        PREEMPTED=1
        DRAIN=${DRAIN:-the job is preempted}
    fi
}

# A pause that signals end early enough.
pause() { sleep "$1" || true; }

# This job's state; a controller that restarts may not answer for a while.
job_state() {
    local state="" tries
    for tries in {1..20}; do
        state=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | sed -n '1s/.*JobState=\([A-Z_]*\).*/\1/p') || true
        [[ -z $state && $tries -lt 20 ]] || break
        pause 5
    done
    echo "${state:-unknown to Slurm}"
}

# Slurm ends this script afterwards. Returns 1 where it refuses.
ask_requeue() {
    local tries
    for tries in {1..6}; do
        scontrol requeue "$SLURM_JOB_ID" && return
        [[ -z $ENDING ]] || exit 143 # it did, and its answer was lost
        ((tries == 6)) || pause 10
    done
    return 1
}

# Before the trainer runs, or servers serve.
leave_if_told() {
    [[ -z $ENDING ]] || leave "$ENDING"
    [[ -z $DRAIN ]] && return
    notice_preemption
    [[ -z $PREEMPTED ]] || requeue "$DRAIN"
    again_or_fail early "$DRAIN before anything was ready: the time limit is too short"
}

# again_or_fail NAME WHY: requeues, but after the third time in a row (until `rm $STATE/again-NAME`) it fails.
again_or_fail() {
    local count
    count=$(($(cat "$STATE/again-$1" 2>/dev/null || echo 0) + 1))
    ((count <= 3)) || fail "$2 (the fourth time in a row)"
    write "$STATE/again-$1" "$count"
    requeue "$2"
}

# give_up NAME WHY: before the first start of a job's trainer it is a mistake, later it may be the nodes.
give_up() {
    ((${SLURM_RESTART_COUNT:-0} > 0 || ${START:-0} > 0)) || fail "$2"
    again_or_fail "$1" "$2"
}

# What fails without a word of its own, such as a file system that is full or away, may be over soon.
catch_faults() {
    trap '((BASH_SUBSHELL > 0)) || { trap - ERR && again_or_fail fault "${BASH_SOURCE[0]##*/}, line $LINENO: $BASH_COMMAND: failed, see above"; }' ERR
}

leave() {
    phase ending "$1; nothing is requeued from here"
    record_end "ended"
    stop_servers
    exit 143
}

# requeue WHY: the same job again, at once or when nodes are free.
requeue() {
    phase requeue "$1"
    local state
    state=$(job_state)
    [[ $state == RUNNING ]] || leave "the job is $state by now"
    record_end "requeue"
    stop_servers
    if [[ $REQUEUE == 0 ]]; then
        say "REQUEUE=0: leaving; submit the same script again to go on"
        exit 85
    fi
    ask_requeue ||
        fail "scontrol requeue $SLURM_JOB_ID was refused; is requeueing allowed here? Submit the same script again"
    for _ in {1..300}; do # Slurm ends this script, after a SIGTERM
        pause 1
        [[ -z $ENDING ]] || exit 143
    done
    fail "requeued 5 minutes ago, and still running"
}

# -- nodes and steps ------------------------------------------------------------------------------------------------

# assign_nodes ROLE COUNT ...: the job's nodes in Slurm's order, or the components of a heterogeneous job.
assign_nodes() {
    local role count group=0 first=0 wanted=0 all=() names i
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        [[ -n ${DRY_RUN:-} ]] || fail "submit this with sbatch, or look at it with DRY_RUN=1"
        while (($#)); do
            for ((i = 0; i < $2; i++)); do NODES[$1]+="${NODES[$1]:+ }$1$i"; done
            shift 2
        done
        return
    fi
    for ((i = 2; i <= $#; i += 2)); do wanted=$((wanted + ${!i})); done
    if [[ -n ${SLURM_HET_SIZE:-} ]]; then
        while (($#)); do
            role=$1 count=$2
            shift 2
            ((count > 0)) || continue
            names=SLURM_JOB_NODELIST_HET_GROUP_$group
            [[ -n ${!names:-} ]] ||
                fail "the heterogeneous job has no component $group for ${role^^}_NODES=$count; give one for each kind of node: trainer : judge"
            mapfile -t all < <(scontrol show hostnames "${!names}")
            ((${#all[@]} == count)) ||
                fail "component $group has ${#all[@]} nodes, but ${role^^}_NODES=$count; give it --nodes=$count or set ${role^^}_NODES"
            NODES[$role]="${all[*]}" GROUP[$role]=$group
            group=$((group + 1))
        done
        ((group == SLURM_HET_SIZE)) || fail "the heterogeneous job has $SLURM_HET_SIZE components, but nodes of $group kinds are asked for"
        return
    fi
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#all[@]} == wanted)) || fail "the job has ${#all[@]} nodes, but $* need $wanted; submit with --nodes=$wanted"
    while (($#)); do
        NODES[$1]="${all[*]:first:$2}"
        first=$((first + $2))
        shift 2
    done
}

# address NODE: where other nodes reach it, as Slurm does.
address() {
    local found
    [[ -n ${SLURM_JOB_ID:-} ]] && found=$(scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || found=
    echo "${found:-$1}"
}

# step NAME ROLE TASKS_PER_NODE NODE...: sets STEP to the srun that runs a command there. Steps share nodes and GPUs.
step() {
    local name=$1 role=$2 tasks=$3 nodes cpus
    shift 3
    nodes=$*
    cpus=SLURM_JOB_CPUS_PER_NODE${GROUP[$role]:+_HET_GROUP_${GROUP[$role]}} # such as 96(x7),64
    cpus=$(tr ',' '\n' <<<"${!cpus:-$tasks}" | sed 's/(.*//' | sort -n | head -n 1)
    # With sbatch --export=... srun would pass on no more than that, were it not for --export=ALL.
    STEP=(srun --job-name="$name" --nodes=$# --ntasks=$(($# * tasks)) --ntasks-per-node="$tasks" --nodelist="${nodes// /,}" --overlap --mem=0
        --cpus-per-task=$((cpus >= tasks ? cpus / tasks : 1)) --overcommit --input=none --export=ALL "${SRUN_MORE[@]}")
    [[ -z ${GROUP[$role]:-} ]] || STEP+=(--het-group="${GROUP[$role]}")
}

# signal_steps SIGNAL NAME...: to every running step of these names, with one question. (kill of an srun would end its tasks at once.)
signal_steps() {
    local id name signal=$1 found=()
    shift
    while read -r id name; do
        # Components of a heterogeneous job have numbers of their own.
        [[ " $* " != *" $name "* || " $JOB_IDS " != *" ${id%%.*} "* ]] || found+=("$id")
    done < <(squeue -h --steps --user="$(id -un)" -o '%i %j' 2>/dev/null)
    [[ ${#found[@]} == 0 ]] || scancel --signal="$signal" "${found[@]}" 2>/dev/null || true
}

job_ids() {
    JOB_IDS=${SLURM_JOB_ID:-}
    local i variable
    for ((i = 0; i < ${SLURM_HET_SIZE:-0}; i++)); do
        variable=SLURM_JOB_ID_HET_GROUP_$i
        JOB_IDS+=" ${!variable}"
    done
}

ports() {
    ((PORT_BASE > 0)) || PORT_BASE=$((10000 + ${SLURM_JOB_ID:-0} % 200 * 100))
}

# Every node: sees the folder of the run and the files, imports what its role needs, has its GPUs, has its ports free.
check_nodes() {
    local node role code=0 index token plan=$ATTEMPT/plan missing=""
    token=$(head -c 12 /dev/urandom | base64 | tr -d '+/=')
    if [[ -z ${DRY_RUN:-} ]]; then
        mkdir -p "$ATTEMPT/seen"
        write "$ATTEMPT/token" "$token"
        {
            printf '%s %s\n' token_file "$ATTEMPT/token" token "$token" seen "$ATTEMPT/seen" files "$FILES"
            for node in ${NODES[trainer]}; do
                echo "node $node trainer $GPUS_PER_NODE$([[ $node != "${NODES[trainer]%% *}" ]] || echo " $PORT_BASE")"
            done
            for node in ${NODES[judge]}; do
                printf 'node %s judge %s' "$node" "$JUDGE_GPUS_PER_NODE"
                for index in "${!SERVER_NODE[@]}"; do [[ ${SERVER_NODE[index]} != "$node" ]] || printf ' %s' "${SERVER_PORT[index]}"; done
                echo
            done
        } >"$plan.tmp"
        write "$plan" "$(<"$plan.tmp")"
    fi
    for role in trainer judge; do
        [[ -n ${NODES[$role]} ]] || continue
        # shellcheck disable=SC2086 # a list
        step check "$role" 1 ${NODES[$role]}
        # shellcheck disable=SC2016 # the node's shell expands it
        run timeout --kill-after=30 "$CHECK_TIMEOUT" "${STEP[@]}" --kill-on-bad-exit=0 bash -c \
            '[[ -z $SITE ]] || source "$SITE"; cd "$ROOT" && exec "$PYTHON" -W ignore "$ROOT/slurm/preflight.py" node "$0"' "$plan" || code=$?
    done
    [[ -z ${DRY_RUN:-} ]] || return 0
    leave_if_told
    for node in ${NODES[trainer]} ${NODES[judge]}; do [[ -f $ATTEMPT/seen/$node ]] || missing+=" $node"; done
    [[ -z $missing ]] ||
        give_up nodes "not fit:$missing (see above; code $code, 124: no answer in CHECK_TIMEOUT=$CHECK_TIMEOUT s). Mend, or sbatch --exclude"
    rm -f "$STATE/again-nodes"
    say "all nodes see ${STATE%/slurm} and the data, import what they need, have their GPUs and free ports"
}
