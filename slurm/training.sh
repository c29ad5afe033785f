# shellcheck shell=bash
# A training run from its first to its last step, through any number of requeues. Sourced after common.sh and servers.sh.
#
#   check  ->  judges  ->  train  ->  by the ranks' exit codes: done | requeue | start the trainer again | stop
#
# In: settings (run_training's callers list theirs at the top). Out: RUN_DIR, with RUN_DIR/slurm for what is the scripts' own:
#   attempt-NNN-JOBID/  job.log, trainer-K.log, judge-I.log, settings.txt, environment.txt (secrets left out), ranks-K/ (exit codes of start K)
#   latest              the newest of them
#   attempts.txt        how each ended
#   starts              checkpoint from which the trainer started last, and how often it did without a newer one
#   guard, guard.log    the small job that requeues this one when the node of its script dies
#   judges.txt          servers that generate (teacher.replicas_file); judge.key their key

settings_of_training() {
    setting CONFIG "$1" text "configuration, a path in the repository or an absolute one"
    setting RUN_DIR "$2" text "folder of the run, on the shared file system"
    setting BLEND "" text "PREFIX_blend.yaml of tools/preprocess_data.py, or [[weight, path prefix], ...]; empty: as CONFIG says"
    setting TOKENIZER_MODEL "" text "sentencepiece model; empty: as BLEND or CONFIG says"
    setting INIT_FROM "" text "folder of tools/export_hf.py --from-hf to start from; empty: as CONFIG says"
    setting OVERRIDES "" text "more section.key=value, separated by spaces, quoted as in a shell"
    setting GPUS_PER_NODE 8 count "GPUS of a trainer node, one rank each; 0: on CPUs, with RANKS_PER_NODE ranks"
    setting RANKS_PER_NODE "$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))" positive "ranks of a trainer node"
    setting TRAINER_NODES 8 positive "nodes that train"
    setting LOG_WANDB offline "offline|online|disabled" "log.wandb; online needs WANDB_API_KEY"
    setting TEACHER_MODEL "" text "folder of the post-trained model; with an external fleet the name that it serves"
    setting TEACHER_URLS "" text "addresses of an external fleet, separated by spaces"
    setting TEACHER_REPLICAS_FILE "" maybe_file "file of an external fleet's addresses, as slurm/teacher_fleet.sh keeps it"
    setting TEACHER_API_KEY_FILE "" maybe_file "file with the key of an external fleet"
    local default=$3
    [[ -z $TEACHER_URLS$TEACHER_REPLICAS_FILE ]] || default=0
    settings_of_judges "$default"
    setting ROLLOUT_URLS "" text "addresses of vLLM servers for the policy's rollouts, separated by spaces; empty: each rank samples its own"
    setting ROLLOUT_API_KEY_FILE "" maybe_file "file with the key of ROLLOUT_URLS"
    setting MAX_STARTS 6 positive "starts of the trainer without a new checkpoint after which the job ends for good"
    setting RESTARTS_IN_PLACE 2 count "of these, starts on the same nodes before the job is requeued"
    setting STOP_PATIENCE 30 count "seconds that a stop waits for answers of its step (train.stop_patience); on preemption the judges end at once"
    setting DRAIN_TIMEOUT 480 positive "seconds that the trainer has to stop; with the judges' 30 s less than --signal gives"
    setting RANK_GRACE 60 positive "seconds that the other ranks have to end by themselves when one has failed"
    settings_of_site
    ((GPUS_PER_NODE == 0 || RANKS_PER_NODE == GPUS_PER_NODE)) ||
        fail "RANKS_PER_NODE=$RANKS_PER_NODE, but GPUS_PER_NODE=$GPUS_PER_NODE: one rank a GPU"
    [[ -z $TEACHER_URLS || -z $TEACHER_REPLICAS_FILE ]] || fail "TEACHER_URLS and TEACHER_REPLICAS_FILE both say where the servers are; unset one"
    [[ -z $TEACHER_URLS$TEACHER_REPLICAS_FILE || $JUDGE_NODES == 0 ]] ||
        fail "JUDGE_NODES=$JUDGE_NODES, but there is an external fleet; set JUDGE_NODES=0"
    [[ $LOG_WANDB != online || -n ${WANDB_API_KEY:-} || -f ${NETRC:-$HOME/.netrc} ]] ||
        fail "LOG_WANDB=online needs WANDB_API_KEY in the environment, or wandb login"
    CONFIG=$(absolute "$CONFIG") RUN_DIR=$(absolute "$RUN_DIR") INIT_FROM=$(absolute "$INIT_FROM") TOKENIZER_MODEL=$(absolute "$TOKENIZER_MODEL")
    TEACHER_URLS=$(words "$TEACHER_URLS") ROLLOUT_URLS=$(words "$ROLLOUT_URLS")
    key_file "$TEACHER_API_KEY_FILE"
    key_file "$ROLLOUT_API_KEY_FILE"
    [[ -f $CONFIG ]] || fail "CONFIG=$CONFIG is no file on $(hostname)"
}

run_training() {
    catch_signals
    job_ids
    ports
    assign_nodes trainer "$TRAINER_NODES" judge "$JUDGE_NODES"
    begin_attempt "$RUN_DIR"
    catch_faults
    REPLICAS_FILE=$STATE/judges.txt
    plan_servers
    phase check "settings, data, nodes"
    compose_trainer
    check_config
    if [[ -z ${DRY_RUN:-} ]] && (($(newest_step) >= LAST_STEP)); then
        phase "done" "step $LAST_STEP of $LAST_STEP is saved in $RUN_DIR; nothing to do"
        record_end "done"
        exit 0
    fi
    leave_to_holder
    start_guard
    check_nodes
    start_servers
    wait_for_servers
    wait_for_fleet
    train
}

# -- start-up checks ------------------------------------------------------------------------------------------------

# The trainer's command: TRAINER, and its settings alone: TRAINER_SETTINGS.
compose_trainer() {
    local lines more=()
    TRAINER_SETTINGS=("run.dir=$RUN_DIR" "log.wandb=$LOG_WANDB" "rollout.engine=in_process" "train.stop_patience=$STOP_PATIENCE")
    if [[ $BLEND == \[* ]]; then
        TRAINER_SETTINGS+=("data.blend=$BLEND")
    elif [[ -n $BLEND ]]; then
        lines=$("$PYTHON" "$ROOT/slurm/preflight.py" blend "$(absolute "$BLEND")") || fail "BLEND=$BLEND cannot be used, see above"
        mapfile -t more <<<"$lines"
        TRAINER_SETTINGS+=("${more[@]}")
    fi
    [[ -z $TOKENIZER_MODEL ]] || TRAINER_SETTINGS+=("data.tokenizer_model=$TOKENIZER_MODEL")
    [[ -z $INIT_FROM ]] || TRAINER_SETTINGS+=("model.init_from=$INIT_FROM")
    [[ -z $TEACHER_MODEL ]] || TRAINER_SETTINGS+=("teacher.model=$TEACHER_MODEL")
    if ((JUDGE_NODES > 0)); then
        TRAINER_SETTINGS+=("teacher.replicas_file=$REPLICAS_FILE" "teacher.api_key_file=$KEY_FILE")
    else
        [[ -z $TEACHER_URLS ]] || TRAINER_SETTINGS+=("teacher.urls=[${TEACHER_URLS// /, }]")
        [[ -z $TEACHER_REPLICAS_FILE ]] || TRAINER_SETTINGS+=("teacher.replicas_file=$TEACHER_REPLICAS_FILE")
        [[ -z $TEACHER_API_KEY_FILE ]] || TRAINER_SETTINGS+=("teacher.api_key_file=$TEACHER_API_KEY_FILE")
    fi
    if [[ -n $ROLLOUT_URLS ]]; then
        TRAINER_SETTINGS+=("rollout.engine=vllm" "rollout.urls=[${ROLLOUT_URLS// /, }]" "rollout.sync_dir=$RUN_DIR/policy_weights")
        [[ -z $ROLLOUT_API_KEY_FILE ]] || TRAINER_SETTINGS+=("rollout.api_key_file=$ROLLOUT_API_KEY_FILE")
    fi
    split_overrides
    TRAINER_SETTINGS+=("${MORE[@]}")
    TRAINER=("$PYTHON" -m megatron_sip.train --config "$CONFIG" "${TRAINER_SETTINGS[@]}")
}

check_config() {
    local facts
    cd "$ROOT" || exit
    FILES=/dev/null
    [[ -n ${DRY_RUN:-} ]] || FILES=$ATTEMPT/files.txt
    if ! facts=$("$PYTHON" "$ROOT/slurm/preflight.py" config --world-size $((TRAINER_NODES * RANKS_PER_NODE)) --files "$FILES" "$CONFIG" \
        "${TRAINER_SETTINGS[@]}"); then
        fail "the configuration does not hold, see above; every key: $PYTHON -m megatron_sip.train --help"
    fi
    ASKS_TEACHER=$(sed -n 's/^ASKS_TEACHER=//p' <<<"$facts") LAST_STEP=$(sed -n 's/^LAST_STEP=//p' <<<"$facts")
    ((ASKS_TEACHER == 0 || JUDGE_NODES > 0)) || [[ -n $TEACHER_URLS$TEACHER_REPLICAS_FILE ]] ||
        fail "the run asks a teacher, but JUDGE_NODES=0 and neither TEACHER_URLS nor TEACHER_REPLICAS_FILE is set"
    ((ASKS_TEACHER == 1 || JUDGE_NODES == 0)) || fail "JUDGE_NODES=$JUDGE_NODES, but this configuration asks no teacher; set JUDGE_NODES=0"
    ((JUDGE_NODES == 0)) || [[ -d $TEACHER_MODEL ]] ||
        fail "TEACHER_MODEL=$TEACHER_MODEL is no folder on $(hostname); give the folder of the post-trained model"
    ((JUDGE_NODES == 0)) || [[ -n ${DRY_RUN:-} ]] || echo "$TEACHER_MODEL/config.json" >>"$FILES"
    say "$((TRAINER_NODES * RANKS_PER_NODE)) ranks, $LAST_STEP steps"
}

# -- the trainer ----------------------------------------------------------------------------------------------------

newest_step() {
    local found
    found=$(find "$RUN_DIR/checkpoints" -maxdepth 1 -type d -name 'iter_*' 2>/dev/null |
        sed -n 's/.*iter_0*\([0-9]\)/\1/p' | sort -n | tail -n 1 || true)
    echo "${found:-0}"
}

start_trainer() {
    local first master
    START=$((START + 1))
    TRAINER_LOG=$ATTEMPT/trainer-$START.log
    export CODES=$ATTEMPT/ranks-$START RANKS_PER_NODE MASTER_PORT=$PORT_BASE WANDB_RUN_ID TORCHDYNAMO_DISABLE
    # shellcheck disable=SC2153 # of common.sh
    read -r first _ <<<"${NODES[trainer]}"
    master=$(address "$first")
    export MASTER_ADDR=$master
    [[ $GPUS_PER_NODE != 0 ]] || TORCHDYNAMO_DISABLE=1
    # shellcheck disable=SC2086 # a list
    step trainer trainer "$RANKS_PER_NODE" ${NODES[trainer]}
    COMMAND=("${STEP[@]}" --kill-on-bad-exit=0 --distribution=block --label --open-mode=append --output="$TRAINER_LOG"
        bash "$ROOT/slurm/rank.sh" "${TRAINER[@]}")
    if [[ -n ${DRY_RUN:-} ]]; then
        echo "export MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT"
        run "${COMMAND[@]}"
        return
    fi
    mkdir "$CODES"
    WANDB_RUN_ID=$(cat "$STATE/wandb_run_id" 2>/dev/null || true)
    if [[ -z $WANDB_RUN_ID ]]; then
        WANDB_RUN_ID=$(head -c 8 /dev/urandom | od -An -tx1 | tr -d ' \n')
        write "$STATE/wandb_run_id" "$WANDB_RUN_ID"
    fi
    FROM=$(newest_step)
    count_start "$FROM"
    rm -f "$STATE/again-early" "$STATE/again-fault"
    phase train "start $START of this attempt, from step $FROM of $LAST_STEP (number $TRIES from there); see $TRAINER_LOG"
    "${COMMAND[@]}" >>"$TRAINER_LOG" 2>&1 &
    TRAINER_PID=$!
    DRAINED=
}

# TRIES: starts from the same checkpoint, this one included.
count_start() {
    local before=-1 tries=0
    [[ ! -s $STATE/starts ]] || read -r before tries <"$STATE/starts"
    TRIES=1
    ((before != $1)) || TRIES=$((tries + 1))
    ((TRIES <= MAX_STARTS)) ||
        fail "MAX_STARTS=$MAX_STARTS starts from step $1 have brought no new checkpoint; read $STATE/latest, remove the cause and $STATE/starts"
    write "$STATE/starts" "$1 $TRIES"
}

# Until all ranks have ended. RANK_CODES: how, one number a rank, "lost" for a rank that could not say.
watch_trainer() {
    local failed=0 killed=0 over=0 rank world=$((TRAINER_NODES * RANKS_PER_NODE)) first_step=""
    while kill -0 "$TRAINER_PID" 2>/dev/null; do
        pause 1
        tend_servers
        # Said now: after KillWait, which the trainer may need for its step, this script is no more.
        [[ -z $ENDING || $PHASE == ending ]] || phase ending "$ENDING; nothing is requeued from here"
        if [[ -z $first_step ]] && first_step=$(grep -om1 'step [0-9]*/[0-9]*' "$TRAINER_LOG" 2>/dev/null); then
            say "$first_step trained, $((SECONDS)) s after this script began"
        fi
        if [[ -n $DRAIN && -z $DRAINED ]]; then
            phase drain "$DRAIN: the trainer saves its step"
            : >"$CODES/stop"
            DRAINED=$SECONDS
        elif [[ -n $DRAINED ]] && ((SECONDS > DRAINED + DRAIN_TIMEOUT)); then
            say "the trainer has not ended after DRAIN_TIMEOUT=$DRAIN_TIMEOUT s; ending it, the run goes on from its last checkpoint"
            signal_steps KILL trainer
            DRAINED=$SECONDS killed=$((killed + 1))
        fi
        # One rank that failed leaves the others in a collective, or they are about to notice.
        if ((failed == 0)) && grep -qsvxE '0|85|86' "$CODES"/[0-9]*; then
            failed=$SECONDS
        elif ((failed > 0 && SECONDS > failed + RANK_GRACE)); then
            say "a rank failed $RANK_GRACE s ago; ending the others"
            signal_steps KILL trainer
            failed=$SECONDS killed=$((killed + 1))
        fi
        # An srun whose slurmstepd was killed waits for ever.
        [[ $(find "$CODES" -type f -name '*[0-9]' | wc -l) -lt $world ]] || over=$((over + 1))
        ((killed < 2 && over < 15)) || kill -KILL "$TRAINER_PID" 2>/dev/null || true
    done
    SRUN_CODE=0
    wait "$TRAINER_PID" || SRUN_CODE=$?
    notice_preemption
    RANK_CODES=()
    for ((rank = 0; rank < world; rank++)); do
        RANK_CODES+=("$(cat "$CODES/$rank" 2>/dev/null || echo lost)")
    done
}

# OUTCOME: what the ranks said counts for more than how srun ended.
judge_outcome() {
    local all=" ${RANK_CODES[*]} "
    if [[ $all == *" 2 "* ]]; then
        OUTCOME="bad input"
    elif [[ $all == *" 87 "* ]]; then
        OUTCOME="hung"
    elif [[ $all == *" 86 "* ]]; then
        OUTCOME="server lost"
    elif [[ $all =~ ^(\ 0)+\ $ ]]; then
        OUTCOME="all done"
    elif [[ $all =~ ^(\ (0|85))+\ $ ]]; then
        OUTCOME="saved"
    else
        OUTCOME="died"
    fi
}

train() {
    local summary
    START=0
    while :; do
        start_trainer
        [[ -z ${DRY_RUN:-} ]] || return 0
        watch_trainer
        judge_outcome
        summary=$(printf '%s\n' "${RANK_CODES[@]}" | sort | uniq -c | awk '{printf "%s%s x %s", (NR > 1 ? ", " : ""), $1, $2}')
        phase ended "$OUTCOME at step $(newest_step) of $LAST_STEP (exit codes of the ranks: $summary; srun: $SRUN_CODE)"
        [[ $OUTCOME == "all done" || $OUTCOME == saved ]] || show_cause
        [[ $OUTCOME != "all done" ]] || finish
        # Later in a job its settings are what they were: then it may be a server or a file system.
        [[ $OUTCOME != "bad input" || $START -gt 1 || ${SLURM_RESTART_COUNT:-0} -gt 0 ]] ||
            fail "bad input, or servers that did not come up: the same would happen again, so nothing is requeued. See $TRAINER_LOG"
        [[ -z $ENDING ]] || leave "$ENDING"
        if [[ $OUTCOME == saved || -n $DRAIN ]]; then
            # No fault of the trainer, unless the time limit leaves no room for a step.
            [[ -z $PREEMPTED && -n $DRAIN && $(newest_step) == "$FROM" ]] || write "$STATE/starts" "$(newest_step) 0"
            requeue "${DRAIN:-the trainer was told to stop (preemption) and has saved}"
        fi
        recover
    done
}

# What the ranks said of it; their stacks follow in the log.
show_cause() {
    local lines
    lines=$(grep -v '^srun: ' "$TRAINER_LOG" | grep -E 'error: |Error: |Fatal |stopped in ' -A 2 || tail -n 15 "$TRAINER_LOG")
    tail -n 15 <<<"$lines" | sed 's/^/    /'
}

# The trainer ended by a fault: again on the same nodes, with the same judges, or elsewhere.
recover() {
    local again=$((TRIES % (RESTARTS_IN_PLACE + 1)))
    if (($(newest_step) > $(cut -d' ' -f1 "$STATE/starts"))); then again=1; fi
    ((again > 0 && RESTARTS_IN_PLACE > 0)) || requeue "$TRIES starts from one checkpoint on these nodes did not get on"
    nodes_answer || requeue "a trainer node does not answer any more"
    phase recover "starting again on the same nodes"
    wait_for_servers
    wait_for_fleet
    leave_if_told
}

nodes_answer() {
    # shellcheck disable=SC2086 # a list
    step answer trainer 1 ${NODES[trainer]}
    timeout --kill-after=30 60 "${STEP[@]}" --kill-on-bad-exit=0 true >>"$TRAINER_LOG" 2>&1
}

finish() {
    stop_servers
    phase "done" "step $LAST_STEP of $LAST_STEP is saved in $RUN_DIR"
    record_end "done"
    exit 0
}
