#!/bin/bash
# Submit ESI -> SET and SPA -> evaluation as jobs that wait for each other. From the project's top folder:
#   slurm/pipeline.sh --runs FOLDER --esi FILE [--set FILE] [--spa FILE] [--eval FILE] [--seeds 0-4 | --prompts "A B"]
#                     [--ratio R] [--criterion NAME] [-- options of sbatch]
# FILE: a config, or the name of a recipe. --ratio: the share of weights in the mask, in place of ESI's config's; 0.1 for SPA.
# --criterion: the mask that SET and SPA use, if ESI's config lists several.
# --seeds: an array of chains, one per seed. --prompts: one chain for each set of prompts that ESI scores with.
# Each chain writes FOLDER/<seed or number>/{esi,set,spa,eval}, a single one FOLDER/{esi,set,spa,eval}; one TensorBoard on
# FOLDER shows all. SET and SPA use the chain's mask, and the evaluation compares their models with that of its config:
# name the same model in all configs.

set -e
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }
refuse() { # field, problem and remedy
    echo "error: $1: $2" >&2
    exit 2
}
runs='' array='' prompts=() criterion='' ratio=''
declare -A config=()
while (($#)); do
    case $1 in
    --) shift && break ;;
    -h | --help) usage && exit ;;
    --runs | --esi | --set | --spa | --eval | --seeds | --prompts | --ratio | --criterion)
        [[ -n ${2:-} ]] || refuse "$1" "has no value; give one, or leave $1 out"
        ;;&
    --runs) runs=$2 ;;
    --esi | --set | --spa | --eval)
        config[${1#--}]=$2
        ;;
    --seeds) array=$2 ;;
    --criterion) criterion=/$2 ;;
    --ratio) ratio=$2 ;;
    --prompts)
        read -r -d '' -a prompts <<<"$2" || : # at the end of the text it reports a failure
        ((${#prompts[@]})) || refuse --prompts "has no value; give files or names, separated by spaces"
        ;;
    *) refuse "$1" "is not an option of this script; see --help, and give options of sbatch after --" ;;
    esac
    shift 2
done
[[ -n $runs && -n ${config[esi]:-} ]] || { usage >&2 && exit 2; }
[[ -z $array || ${#prompts[@]} -eq 0 ]] || refuse "--seeds and --prompts" "give one of them"
[[ ${#prompts[@]} -eq 0 ]] || array=0-$((${#prompts[@]} - 1))
[[ -f slurm/env.sh ]] ||
    refuse "$PWD" "holds no slurm/env.sh; start from the project's top folder, or from DIR of esi-ds slurm copy DIR"
source slurm/env.sh
python -c 'import importlib.util as u; raise SystemExit(u.find_spec("esi_ds") is None)' ||
    refuse "python = $(command -v python)" "has no esi_ds; name the environment that has it in slurm/env.sh"
for stage in "${!config[@]}"; do # a file, or the name of a recipe
    file=${config[$stage]}
    if [[ -f $file ]]; then
        text=$(<"$file")
    else
        text=$(python -m esi_ds recipes show --field="--$stage" -- "$file") || exit 2
    fi
    case $stage in
    esi) continue ;;
    set | spa) section=tune ;;
    *) section=$stage ;;
    esac
    grep -qE "^([^#]*[{, ])?[\"']?${section}[\"']? *:" <<<"$text" ||
        refuse "--$stage = $file" "has no section $section; give a config of this stage"
done

# Overrides are YAML: within quotation marks a folder may hold anything, also commas, colons and a #.
chain=${runs//\\/\\\\}
chain=${chain//\"/\\\"}
# A literal placeholder in a job's arguments: job.sh replaces it by the number of the task.
[[ -z $array ]] || chain+=/@task@
submit() { # stage, dependency, arguments of the stage
    local stage=$1 after=$2
    shift 2
    local kind=afterok
    [[ -z $array ]] || kind=aftercorr
    local id
    id=$(sbatch --parsable ${array:+--array="$array"} ${after:+--dependency="$kind:$after" --kill-on-invalid-dep=yes} \
        "${options[@]}" "slurm/$stage.sbatch" "${sets[@]}" --config "${config[$stage]}" \
        "run.output_dir=\"$chain/$stage\"" "$@") || return
    echo "${id%%;*}" # with several clusters "id;cluster"
}
options=("$@")
overrides=() sets=()
if [[ ${#prompts[@]} -gt 0 ]]; then
    sets=(--prompts "${prompts[*]}") # job.sh takes them
    overrides=("data.prompts.path=@prompts@")
elif [[ -n $array ]]; then
    overrides=("run.seed=@task@")
fi
esi=$(submit esi '' "${overrides[@]}" ${ratio:+"select.ratio=$ratio"})
echo "esi: job $esi"
seed=()
[[ ${#prompts[@]} -gt 0 ]] || seed=("${overrides[@]}")
tuned='' models=''
for stage in set spa; do
    [[ -n ${config[$stage]:-} ]] || continue
    job=$(submit "$stage" "$esi" "tune.mask=\"$chain/esi/mask$criterion\"" "${seed[@]}")
    echo "$stage: job $job after $esi"
    tuned+=${tuned:+:}$job
    # shellcheck disable=SC2089  # the quotes are YAML's
    models+=${models:+, }"{name: ${stage^^}, path: \"$chain/$stage/model\"}"
done
if [[ -n ${config[eval]:-} ]]; then
    # shellcheck disable=SC2090
    job=$(submit eval "${tuned:-$esi}" ${models:+"eval.models=[$models]"})
    echo "eval: job $job after ${tuned:-$esi}"
fi
printf 'watch: tensorboard --logdir %q; esi-ds status %q/*%s\n' "$runs" "$runs" "${array:+/*}"
