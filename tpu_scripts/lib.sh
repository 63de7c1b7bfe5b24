# shellcheck shell=bash
# What the scripts share: options, a dry run, commands on every worker. Source it, then call parse_options FLAGS "$@".
#
# Every option may come from the environment as well: --zone and ZONE are the same.

set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # the scripts use it
root=$(dirname "$scripts")
dry_run=false

# The scripts' shared options, with the variable of each.
known_options="name=NAME project=PROJECT zone=ZONE accelerator=ACCELERATOR runtime=RUNTIME bucket=BUCKET slices=SLICES
 preset=PRESET steps=STEPS save-every=SAVE_EVERY mesh=MESH worker=WORKER image=IMAGE hosts=HOSTS processes=PROCESSES
 topology=TOPOLOGY chips-per-node=CHIPS_PER_NODE nodes-per-slice=NODES_PER_SLICE gpus=GPUS partition=PARTITION time=TIME
 to-accelerator=TO_ACCELERATOR port=PORT folder=FOLDER stages=STAGES launches=LAUNCHES"

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# parse_options "FLAG ..." ARGUMENT ...: flags are options without a value; --a-b sets flag_a_b. The comment at the head
# of a script is its help.
parse_options() {
  local flags=$1 option variable pair
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=true ;;
      -h | --help) sed -n '2,/^\(# shellcheck\|[^#]\)/{/^# shellcheck/d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
      --*)
        option=${1#--}
        if [[ " $flags " == *" ${option%%=*} "* ]]; then
          printf -v "flag_${option//-/_}" true
        else
          variable=
          for pair in $known_options; do
            [ "${pair%%=*}" = "${option%%=*}" ] && variable=${pair#*=}
          done
          [ -n "$variable" ] || fail "unknown option $1 (--help lists them)"
          if [[ $option == *=* ]]; then
            printf -v "$variable" %s "${option#*=}"
          else
            [ $# -gt 1 ] || fail "option $1 needs a value"
            shift
            printf -v "$variable" %s "$1"
          fi
        fi
        ;;
      *) fail "unknown argument $1 (--help lists the options)" ;;
    esac
    shift
  done
}

# need VARIABLE ...: end, naming all options that are missing at once.
need() {
  local missing=() pair variable option
  for variable in "$@"; do
    if [ -z "${!variable-}" ]; then
      option=
      for pair in $known_options; do [ "${pair#*=}" = "$variable" ] && option=${pair%%=*}; done
      missing+=("--$option (or the variable $variable): $(meaning "$variable")")
    fi
  done
  if [ ${#missing[@]} -gt 0 ]; then
    { echo "$(basename "$0"): missing options:"; printf '  %s\n' "${missing[@]}"; } >&2
    exit 2
  fi
}

meaning() {
  case $1 in
    NAME) echo "name of the TPU, the job or the queued resource, as my-run" ;;
    PROJECT) echo "the Google Cloud project" ;;
    ZONE) echo "its zone, as us-east5-a" ;;
    ACCELERATOR) echo "the slice, as v5litepod-16, v5p-32 or v6e-16" ;;
    TO_ACCELERATOR) echo "the slice to resume on, as v5litepod-8" ;;
    RUNTIME) echo "the software of the TPU VM, as v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e" ;;
    BUCKET) echo "where to save, as gs://bucket/folder" ;;
    IMAGE) echo "a container image with this repository and jax[tpu]" ;;
    TOPOLOGY) echo "the slice as GKE names it, as 4x4" ;;
    HOSTS) echo "names of the machines, with commas between" ;;
    FOLDER) echo "where to save: a folder that all machines see, or gs:// or s3://" ;;
    *) echo "see --help" ;;
  esac
}

# Print a command as the shell would read it; run it unless this is a dry run.
run() {
  printf '+%s\n' "$(printf ' %q' "$@")" # by one call: what runs beside it prints, too
  $dry_run || "$@"
}

slices() { echo "${SLICES:-1}"; }

# The TPU VMs: one, or one per slice.
nodes() {
  local i
  if [ "$(slices)" -eq 1 ]; then echo "$NAME"; else
    for ((i = 0; i < $(slices); i++)); do echo "$NAME-$i"; done
  fi
}

# on_workers WORKER COMMAND: on these workers (a number, or all) of every slice, at the same time.
on_workers() {
  local node pids=() status=0
  for node in $(nodes); do
    if $dry_run; then tpu_ssh "$node" "$1" "$2"; else
      tpu_ssh "$node" "$1" "$2" &
      pids+=($!)
    fi
  done
  for node in "${pids[@]}"; do wait "$node" || status=$?; done
  return "$status"
}

tpu_ssh() {
  run gcloud compute tpus tpu-vm ssh "$1" --project="$PROJECT" --zone="$ZONE" --worker="$2" --command="$3"
}

# The training program with the options that were given; all processes run the same line.
train_command() {
  local line="tpu_scripts/train.py $1 --preset ${PRESET:-124m} --steps ${STEPS:-1000} --save-every ${SAVE_EVERY:-100}"
  [ -z "${MESH-}" ] || line+=" --mesh $MESH"
  echo "$line"
}
