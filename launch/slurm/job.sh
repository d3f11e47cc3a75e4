# What train.sbatch and train_torchrun.sbatch share: bash functions for the batch script of a job.

# A job that is being ended may signal its batch shell too, which must live until srun has ended.
trap : TERM

# The job by a name that means this task alone: in an array SLURM_JOB_ID can be the number of the whole array.
this_job() {
    if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# start_job ARGUMENT...: sets `arguments` and `logs`, and where the ranks meet: a container may have no scontrol.
start_job() {
    arguments=("${@//\{task\}/${SLURM_ARRAY_TASK_ID:-}}")
    logs="${COMOL_LOGS:-slurm_logs}/$(this_job)"
    mkdir -p "$logs" || exit 2
    local restart=${SLURM_RESTART_COUNT:-0}
    # another port per job and restart, so that a requeued job never meets its own old rendezvous
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))
    MASTER_ADDR=$(scontrol show hostnames | head -n 1) && export MASTER_ADDR || exit 1
    # Slurm 22.05 does not tell a job when it ends; one without limit has no such time
    local end
    end=$(squeue --noheader --job "$(this_job)" --format=%e)
    if [[ -z "${SLURM_JOB_END_TIME:-}" ]] && end=$(date -d "$end" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=$end
    fi
    echo "$(date -Is) job $(this_job), restart $restart, on $SLURM_JOB_NODELIST, ranks' logs in $logs"
}

# step NAME COMMAND...: one process per task, each with its own log. The exit code is the highest of all tasks.
# --kill-on-bad-exit would kill the ranks still saving when the first ends with 75: --wait gives them a minute.
step() {
    local name=$1
    shift
    srun --export=ALL --kill-on-bad-exit=0 --wait=60 --open-mode=append --output="$logs/${name}_rank%t.log" \
        ${COMOL_SRUN_OPTIONS:-} "$@"
    local code=$?
    if ((code != 0 && code != 75)); then
        echo "$(date -Is) $name ended with exit code $code; its ranks' last lines:" >&2
        tail -n 3 "$logs/${name}"_rank*.log >&2
    fi
    return $code
}

# stage PYTHON...: one task per node copies the weights to the node's own disk, if COMOL_STAGE_DIR says where.
stage() {
    if [[ -n "${COMOL_STAGE_DIR:-}" ]]; then
        # --wait=0: the first node to be done must not end the others
        step stage --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --wait=0 \
            "$@" launch/slurm/stage.py "${arguments[@]}"
    fi
}

# end_job CODE: the trainer's 75 means "saved after a signal, start me again".
# A job that is being cancelled, or requeued by somebody else, is not RUNNING any more, or with another restart, if this
# node was lost to SLURM and others have taken over: it is left alone.
end_job() {
    local facts
    facts=" $(scontrol show job --oneliner "$(this_job)") "
    if (($1 == 75)) && [[ $facts == *' JobState=RUNNING '* && $facts == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        echo "$(date -Is) the run is saved; requeueing job $(this_job)"
        scontrol requeue "$(this_job)" && sleep 60 # SLURM ends this script meanwhile
    fi
    exit "$1"
}
