# What every job here does: source it with the stage and its arguments. One task per device, started by srun itself: the
# deepspeed launcher dies of Slurm's warning signal and reports success.

stage=$1
shift
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "this is a batch script: source slurm/env.sh && sbatch slurm/$stage.sbatch --config FILE" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR" || exit 2
if [[ ! -f slurm/env.sh || ! -f launch/$stage.py ]]; then
    echo "$PWD holds no esi_ds: submit from the project's top folder" >&2
    exit 2
fi
source slurm/env.sh || exit 2

# pipeline.sh writes these where an array's task is to put its own number or set of prompts.
read -ra prompts <<<"${ESI_DS_PROMPTS:-}"
arguments=("${@//@task@/${SLURM_ARRAY_TASK_ID:-0}}")
arguments=("${arguments[@]//@prompts@/${prompts[${SLURM_ARRAY_TASK_ID:-0}]:-}}")

# An array's own id stands for all its tasks, and one of them has it as its job id too.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
logs=slurm/logs/$SLURM_JOB_ID/start-$restarts
mkdir -p "$logs"
echo "$(date -Is) job $job, start $((restarts + 1)) (restarts: $restarts), nodes: $SLURM_JOB_NODELIST, logs: $logs"

# Slurm ends this shell too when it preempts a job. A trap, not "ignore": children would inherit that.
trap : TERM USR1
# No binding by srun: without --cpus-per-task it would give each rank one core. The ranks divide the job's cores.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$ESI_DS_TASKS_PER_NODE" --cpu-bind=none \
    --kill-on-bad-exit=1 --output="$logs/rank-%t.log" python -u "launch/$stage.py" "${arguments[@]}" &
steps=$!
wait "$steps"
code=$?
while kill -0 "$steps" 2>/dev/null; do # a signal ended the wait, not the ranks
    wait "$steps"
    code=$?
done

# A rank that fails while others still start has srun end those, and they leave with 75, as at any signal; srun reports the
# greatest code. So 75 stands only where no rank tells of a failure of its own.
if [[ $code -eq 75 ]]; then
    told=$(grep -shE '^(error: |rank [0-9]+ failed:)' "$logs"/rank-*.log | grep -v 'failed: lost another rank')
    case $told in
    '') ;;
    error:*) code=2 ;;
    *) code=1 ;;
    esac
fi

case $code in
0) echo "$(date -Is) done" ;;
75)
    echo "$(date -Is) stopped by a signal, everything saved: requeueing, unless it was cancelled"
    # Incomplete: not a job that scancel is ending, which saves at its SIGTERM too.
    scontrol requeue Incomplete "$job" || echo "not requeued: start the same command again to go on" >&2
    ;;
*)
    # The rank that failed first wrote first; what the others say follows from it.
    echo "$(date -Is) failed with exit code $code; the first message:" >&2
    first=$(grep -slE '^(error: |rank [0-9]+ failed:)' "$logs"/rank-*.log | xargs -r ls -tr | head -n 1)
    [[ -n $first ]] && { echo "--- $first" >&2; grep -m 1 -A 40 -E '^(error: |rank [0-9]+ failed:)' "$first" >&2; }
    ;;
esac
exit "$code"
