# What all jobs share: source it with the stage and its arguments. srun itself starts one task per device, because the
# deepspeed launcher dies of Slurm's warning signal and reports success.
# shellcheck shell=bash

stage=$1
shift
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "this is a batch script: source slurm/env.sh && sbatch slurm/$stage.sbatch --config FILE" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR" || exit 2
if [[ ! -f slurm/env.sh ]]; then
    echo "$PWD holds no slurm/env.sh: submit from the project's top folder, or from DIR of esi-ds slurm copy DIR" >&2
    exit 2
fi
source slurm/env.sh || exit 2
if ! python -c 'import importlib.util as u; raise SystemExit(u.find_spec("esi_ds") is None)'; then
    echo "python = $(command -v python) has no esi_ds: name the environment that has it in slurm/env.sh" >&2
    exit 2
fi
# A checkout runs its own code, any other folder the package that is installed.
program=("launch/$stage.py")
[[ -f launch/$stage.py ]] || program=(-m "esi_ds.launch.$stage")

# Written by pipeline.sh: the sets of prompts (an argument, as the environment is lost with sbatch --export=NONE), and
# placeholders, for which a task of an array fills in its own number or set.
prompts=()
if [[ ${1:-} == --prompts ]]; then
    read -ra prompts <<<"$2"
    shift 2
fi
# In quotation marks: from bash 5.2 on, a bare & in a replacement would be what it replaces.
arguments=("${@//@task@/"${SLURM_ARRAY_TASK_ID:-0}"}")
arguments=("${arguments[@]//@prompts@/"${prompts[${SLURM_ARRAY_TASK_ID:-0}]:-}"}")

# An array's id stands for all its tasks, and is also the job id of one of them.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
logs=slurm/logs/$SLURM_JOB_ID/start-$restarts
mkdir -p "$logs"
echo "$(date -Is) job $job, start $((restarts + 1)) (restarts: $restarts), nodes: $SLURM_JOB_NODELIST, logs: $logs"

# Slurm also signals this shell when it preempts a job. A trap rather than "ignore", which children would inherit.
trap : TERM USR1
# srun must not bind: without --cpus-per-task it would give each rank one core. The ranks divide the job's cores.
# --export: the ranks get what env.sh has set; in a job of sbatch --export=NONE srun would not pass it on.
# --wait=0: rank 0 writes the report while the others have ended, and a site's WaitTime would have it killed.
# --ntasks: else a job with SLURM_NTASKS, of sbatch --ntasks-per-node or a shell of srun's, would have that many ranks.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * ESI_DS_TASKS_PER_NODE))" \
    --ntasks-per-node="$ESI_DS_TASKS_PER_NODE" --cpu-bind=none \
    --kill-on-bad-exit=1 --wait=0 --export=ALL --output="$logs/rank-%t.log" python -u "${program[@]}" "${arguments[@]}" &
steps=$!
wait "$steps"
code=$?
while kill -0 "$steps" 2>/dev/null; do # a signal ended the wait, not the ranks
    wait "$steps"
    code=$?
done

# A rank that has not yet loaded what handles USR1 and TERM dies of them, with nothing to save.
[[ $code -eq 138 || $code -eq 143 ]] && code=75
# If a rank fails while others are still starting, srun ends those, and they exit with 75, as at any signal; srun reports
# the greatest code. So 75 counts only if no rank reports a failure of its own.
says='^(error: |rank [0-9]+ (failed:|died of)|Fatal Python error:)' # the last is of a rank that C++ aborted
if [[ $code -eq 75 ]]; then
    failures=$(grep -shE "$says" "$logs"/rank-*.log | grep -v 'failed: lost another rank')
    case $failures in
    '') ;;
    error:*) code=2 ;;
    *) code=1 ;;
    esac
fi

# Whether the time limit ended this start (more than half of the time is gone, or all but --signal's 300 s and the minute
# by which Slurm may be early), and neither it nor the one before kept anything: another start would not either.
kept_nothing() { grep -qsE 'interrupted: .*(before anything was done|this start has kept nothing)' "$1"/rank-*.log; }
is_in_vain() {
    [[ -n ${SLURM_JOB_END_TIME:-} && $restarts -gt 0 ]] || return
    local left=$((SLURM_JOB_END_TIME - $(date +%s)))
    ((left <= 360 || left < SECONDS)) && kept_nothing "$logs" && kept_nothing "${logs%-*}-$((restarts - 1))"
}
if [[ $code -eq 75 ]] && is_in_vain; then
    echo "error: --time: ended this start and the one before with nothing kept; give the job more time: a batch is kept" \
        "once it is whole, and so is a task of lm-eval" >&2
    exit 2
fi

case $code in
0) echo "$(date -Is) done" ;;
75)
    echo "$(date -Is) stopped by a signal, everything saved: requeueing, unless it was cancelled"
    # Incomplete: excludes a job that scancel is ending, which also saves on SIGTERM.
    scontrol requeue Incomplete "$job" || echo "not requeued: start the same command again to continue" >&2
    ;;
*)
    # The rank that failed first wrote first; the messages of the others are consequences.
    echo "$(date -Is) failed with exit code $code; the first message:" >&2
    first=$(grep -slE "$says" "$logs"/rank-*.log | xargs -r ls -tr | head -n 1)
    if [[ -n $first ]]; then
        echo "--- $first" >&2
        grep -m 1 -A 40 -E "$says" "$first" >&2
    else # as where python itself does not start
        tail -v -n 20 "$logs/rank-0.log" >&2
    fi
    ;;
esac
exit "$code"
