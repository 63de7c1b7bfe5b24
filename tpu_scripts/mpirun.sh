#!/usr/bin/env bash
# Train with Open MPI, one process per GPU; jax.distributed reads Open MPI's variables.
#
#   tpu_scripts/mpirun.sh --folder /shared/runs/1 --hosts gpu1,gpu2 [--gpus 4] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need FOLDER HOSTS

gpus=${GPUS:-4}
IFS=, read -ra machines <<<"$HOSTS"
slots=$(printf "%s:$gpus," "${machines[@]}")
# shellcheck disable=SC2046 # the command is words
run mpirun -np $((gpus * ${#machines[@]})) --host "${slots%,}" --wdir "$root" -x PYTHONPATH=. \
  .venv/bin/python $(train_command "$FOLDER") --distributed
