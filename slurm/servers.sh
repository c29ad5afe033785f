# shellcheck shell=bash
# Servers of a job: one step each, restarted when it ends, listed in a file as long as they generate.
# Sourced after common.sh. In: NODES[judge], settings. Out: REPLICAS_FILE.

declare -a SERVER_NAME=() SERVER_NODE=() SERVER_URL=() SERVER_PID=() SERVER_DUE=() SERVER_FAILED=() SERVER_SLOT=() SERVER_PORT=() SERVER_READY=()
LISTED=

settings_of_judges() {
    setting JUDGE_NODES "$1" count "nodes with judge servers; 0 with TEACHER_URLS or TEACHER_REPLICAS_FILE"
    setting JUDGE_GPUS_PER_NODE "$GPUS_PER_NODE" count "GPUS of a judge node; 0: on CPUs"
    setting JUDGE_TENSOR_PARALLEL_SIZE "$((JUDGE_GPUS_PER_NODE > 0 ? JUDGE_GPUS_PER_NODE : 1))" positive \
        "GPUs of one judge server; a node has as many servers as fit"
    setting JUDGE_FLAGS "--dtype auto --max-model-len 4096" text "more flags of vLLM for the judge servers"
    setting JUDGE_MIN_READY 1 positive "servers that must generate before the trainer starts"
    setting JUDGE_READY_TIMEOUT 1800 positive "seconds until so many must generate"
    setting JUDGE_BACKOFF 5 count "seconds before a server that ended is started again; doubled each time, at most 120"
    local flag
    for flag in --api-key --host --port --model --served-model-name --tensor-parallel-size; do
        # A key would be readable in every list of processes; the others are decided here.
        [[ " $JUDGE_FLAGS" != *" $flag"[=\ ]* ]] ||
            fail "JUDGE_FLAGS holds $flag, which the script sets: keys are made in a file; TEACHER_MODEL, JUDGE_TENSOR_PARALLEL_SIZE, PORT_BASE"
    done
    ((JUDGE_GPUS_PER_NODE == 0 || JUDGE_TENSOR_PARALLEL_SIZE <= JUDGE_GPUS_PER_NODE)) ||
        fail "JUDGE_TENSOR_PARALLEL_SIZE=$JUDGE_TENSOR_PARALLEL_SIZE > JUDGE_GPUS_PER_NODE=$JUDGE_GPUS_PER_NODE: a server lives on one node"
    JUDGES_PER_NODE=$((JUDGE_GPUS_PER_NODE > 0 ? JUDGE_GPUS_PER_NODE / JUDGE_TENSOR_PARALLEL_SIZE : 1))
    ((JUDGES_PER_NODE <= 90)) || fail "JUDGES_PER_NODE=$JUDGES_PER_NODE: at most 90 servers a node have ports"
    ((JUDGE_NODES == 0 || JUDGE_MIN_READY <= JUDGE_NODES * JUDGES_PER_NODE)) ||
        fail "JUDGE_MIN_READY=$JUDGE_MIN_READY, but there are only JUDGE_NODES=$JUDGE_NODES x $JUDGES_PER_NODE servers"
}

# Where each server will be. Ports differ between all servers of a machine, also where several nodes are one machine.
plan_servers() {
    local node slot index=0 host at
    KEY_FILE=${TEACHER_API_KEY_FILE:-$STATE/judge.key}
    export MODEL=$TEACHER_MODEL KEY_FILE
    for node in ${NODES[judge]}; do
        at=$(address "$node")
        for ((slot = 0; slot < JUDGES_PER_NODE; slot++)); do
            SERVER_NAME[index]=judge-$index SERVER_NODE[index]=$node SERVER_SLOT[index]=$slot
            SERVER_PORT[index]=$((PORT_BASE + 1 + index % 90))
            SERVER_URL[index]=http://$at:${SERVER_PORT[index]}/v1
            SERVER_PID[index]="" SERVER_DUE[index]=0 SERVER_FAILED[index]=0 SERVER_READY[index]=$ATTEMPT/ready-$index
            index=$((index + 1))
        done
    done
    [[ ${#SERVER_NAME[@]} == 0 || -n ${DRY_RUN:-} ]] || secret_file "$KEY_FILE"
}

server_command() {
    local index=$1 host=0.0.0.0
    [[ ${SERVER_URL[index]} != http://127.* ]] || host=127.0.0.1
    step "${SERVER_NAME[index]}" judge 1 "${SERVER_NODE[index]}"
    # shellcheck disable=SC2206 # several flags in one variable
    COMMAND=("${STEP[@]}" --kill-on-bad-exit=0 --open-mode=append --output="$ATTEMPT/${SERVER_NAME[index]}.log"
        bash "$ROOT/slurm/server.sh" "${SERVER_READY[index]}" "${SERVER_URL[index]}"
        "$((JUDGE_GPUS_PER_NODE > 0 ? JUDGE_TENSOR_PARALLEL_SIZE : 0))" "$((SERVER_SLOT[index] * JUDGE_TENSOR_PARALLEL_SIZE))"
        "$PYTHON" -m megatron_sip.teacher.serve --model "$TEACHER_MODEL" --host "$host" --port "${SERVER_PORT[index]}"
        --device "$([[ $JUDGE_GPUS_PER_NODE == 0 ]] && echo cpu || echo cuda)" --tensor-parallel-size "$JUDGE_TENSOR_PARALLEL_SIZE"
        --enable-prompt-tokens-details $JUDGE_FLAGS)
}

start_servers() {
    local index
    ((${#SERVER_NAME[@]} > 0)) || return 0
    phase judges "starting ${#SERVER_NAME[@]} servers of $TEACHER_MODEL on ${NODES[judge]}"
    for index in "${!SERVER_NAME[@]}"; do start_server "$index"; done
}

start_server() {
    [[ -n ${DRY_RUN:-} ]] || SERVER_READY[$1]=$ATTEMPT/ready-$1-$SECONDS # its own: the one before may still be ending
    server_command "$1"
    if [[ -n ${DRY_RUN:-} ]]; then
        run "${COMMAND[@]}"
        return
    fi
    "${COMMAND[@]}" >>"$ATTEMPT/${SERVER_NAME[$1]}.log" 2>&1 &
    SERVER_PID[$1]=$!
}

# Called once a second: starts again what ended, lists what generates.
tend_servers() {
    local index code wait_for list=""
    for index in "${!SERVER_NAME[@]}"; do
        if [[ -z ${SERVER_PID[index]} ]]; then
            if [[ -z $DRAIN$ENDING ]] && ((SECONDS >= SERVER_DUE[index])); then
                say "${SERVER_NAME[index]}: starting again on ${SERVER_NODE[index]}"
                start_server "$index"
            fi
        elif ! kill -0 "${SERVER_PID[index]}" 2>/dev/null || [[ -f ${SERVER_READY[index]}.ended ]]; then
            pause 1 # an srun that is about to end knows the code
            kill -KILL "${SERVER_PID[index]}" 2>/dev/null || true
            code=0
            wait "${SERVER_PID[index]}" || code=$?
            rm -f "${SERVER_READY[index]}"
            SERVER_PID[index]=""
            notice_preemption
            [[ -z $DRAIN$ENDING ]] || continue
            wait_for=$((JUDGE_BACKOFF << (SERVER_FAILED[index] < 5 ? SERVER_FAILED[index] : 5)))
            ((wait_for <= 120)) || wait_for=120
            SERVER_DUE[index]=$((SECONDS + wait_for)) SERVER_FAILED[index]=$((SERVER_FAILED[index] + 1))
            say "${SERVER_NAME[index]} on ${SERVER_NODE[index]} ended with code $code (its log: $ATTEMPT); starting it again in $wait_for s"
        elif [[ -f ${SERVER_READY[index]} ]]; then
            SERVER_FAILED[index]=0
            list+="${SERVER_URL[index]}"$'\n'
        fi
    done
    if [[ -n $list && $list != "$LISTED" ]]; then
        write "$REPLICAS_FILE" "${list%$'\n'}"
        LISTED=$list
        say "$(grep -c . <<<"$list") of ${#SERVER_NAME[@]} servers generate; listed in $REPLICAS_FILE"
    elif [[ -z $list ]]; then
        LISTED= # nobody to list: the trainer keeps the last list and waits
    fi
}

# Returns when JUDGE_MIN_READY servers have generated.
wait_for_servers() {
    local deadline=$((SECONDS + JUDGE_READY_TIMEOUT)) count=0 index hopeless
    ((${#SERVER_NAME[@]} > 0)) && [[ -z ${DRY_RUN:-} ]] || return 0
    while :; do
        leave_if_told
        tend_servers
        count=$(grep -c . <<<"$LISTED" || true)
        if ((count >= JUDGE_MIN_READY)); then
            rm -f "$STATE/again-judges"
            return 0
        fi
        hopeless=1
        for index in "${!SERVER_NAME[@]}"; do ((SERVER_FAILED[index] >= 2)) || hopeless=; done
        [[ -z $hopeless ]] || no_judges "every judge server has ended twice before its first token"
        ((SECONDS <= deadline)) ||
            no_judges "only $count of JUDGE_MIN_READY=$JUDGE_MIN_READY judge servers generate after JUDGE_READY_TIMEOUT=$JUDGE_READY_TIMEOUT s"
        pause 1
    done
}

no_judges() {
    local index
    for index in "${!SERVER_NAME[@]}"; do
        if [[ ! -f ${SERVER_READY[index]} ]]; then
            say "${SERVER_NAME[index]} on ${SERVER_NODE[index]}, the end of its log:"
            tail -n 15 "$ATTEMPT/${SERVER_NAME[index]}.log" >&2 || true
            break
        fi
    done
    give_up judges "$1; the logs are in $ATTEMPT/judge-*.log. Usual causes: memory, JUDGE_FLAGS, JUDGE_TENSOR_PARALLEL_SIZE, the model's folder"
}

# Returns when a server of an external fleet has generated.
wait_for_fleet() {
    local deadline=$((SECONDS + JUDGE_READY_TIMEOUT)) url key=${SIP_TEACHER_API_KEY:-} problem="" told="" urls=$TEACHER_URLS
    [[ -z ${DRY_RUN:-} && -n $TEACHER_URLS$TEACHER_REPLICAS_FILE ]] || return 0
    [[ -z $TEACHER_API_KEY_FILE ]] || key=$(<"$TEACHER_API_KEY_FILE")
    phase judges "looking for a server of the external fleet that generates"
    while :; do
        leave_if_told
        [[ -z $TEACHER_REPLICAS_FILE ]] || urls=$(sed "s/#.*//; s/^ *- *//; s/[\"']//g" "$TEACHER_REPLICAS_FILE" || true)
        problem="error: $TEACHER_REPLICAS_FILE lists no server"
        for url in $urls; do
            leave_if_told
            if problem=$(SIP_TEACHER_API_KEY=$key "$PYTHON" "$ROOT/slurm/preflight.py" generates "$url" "$TEACHER_MODEL" 2>&1); then
                say "$url generates"
                rm -f "$STATE/again-judges"
                return 0
            fi
        done
        [[ $problem == "$told" ]] || say "not yet: ${problem#error: }"
        told=$problem
        ((SECONDS <= deadline)) ||
            give_up judges "no server of the external fleet generates after JUDGE_READY_TIMEOUT=$JUDGE_READY_TIMEOUT s: ${problem#error: }"
        pause 5
    done
}

stop_servers() {
    local index deadline left
    [[ -z ${DRY_RUN:-} ]] || return 0
    (($(running_servers) > 0)) || return 0
    signal_steps TERM "${SERVER_NAME[@]}"
    deadline=$((SECONDS + 20))
    while left=$(running_servers) && ((left > 0 && SECONDS < deadline)); do pause 1; done
    for index in "${!SERVER_NAME[@]}"; do
        [[ -z ${SERVER_PID[index]} ]] || kill -KILL "${SERVER_PID[index]}" 2>/dev/null || true
        SERVER_PID[index]=""
    done
}

running_servers() {
    local index count=0
    for index in "${!SERVER_NAME[@]}"; do
        [[ -z ${SERVER_PID[index]} ]] || ! kill -0 "${SERVER_PID[index]}" 2>/dev/null || count=$((count + 1))
    done
    echo "$count"
}
