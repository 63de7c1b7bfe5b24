#!/usr/bin/env bash
# Lose a worker of a pipeline and all that its machine held, in the middle of a run; the others go on where they were.
#
# On a TPU slice, with the options of create.sh and stages.sh (the slice is deleted at the end):
#   tpu_scripts/stages_drill.sh --name drill --project p --zone us-east5-a --runtime v2-alpha-tpuv5-lite \
#     --accelerator v5litepod-16 --bucket gs://b/drill [--worker 1] [--steps 400] [--dry-run]
# On this machine, with processes in place of workers (needs jax, flax and matplotlib):
#   tpu_scripts/stages_drill.sh --local --folder /tmp/drill [--processes 4] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "local" "$@"

on_tpu() {
  need NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET
  export NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET SLICES PRESET STAGES STEPS SAVE_EVERY LAUNCHES
  local launched look
  dry=() # not local: the trap reads it when this function is over, and must not delete anything in a dry run
  ! $dry_run || dry=(--dry-run)
  trap '"$scripts/teardown.sh" "${dry[@]}"' EXIT
  "$scripts/create.sh" "${dry[@]}"
  "$scripts/setup.sh" "${dry[@]}"
  "$scripts/stages.sh" "${dry[@]}" &
  launched=$!
  look=(gcloud storage ls "$BUCKET/checkpoints/*/commit_success.txt")
  if $dry_run; then run "${look[@]}"; else
    until "${look[@]}" 2>/dev/null; do sleep 10; done
  fi
  # A machine in the place of this one would find nothing in its memory.
  tpu_ssh "$(nodes | head -n 1)" "${WORKER:-1}" \
    "pkill -KILL -u \"\$USER\" -f '^[.]venv/bin/python examples/_stage_worker.py'; rm -rf /dev/shm/$NAME"
  wait "$launched" || fail "the pipeline did not go on"
  "$scripts/teardown.sh" "${dry[@]}"
  trap - EXIT
}

on_this_machine() {
  need FOLDER
  local processes=${PROCESSES:-4}
  run env PYTHONPATH="$root" "${PYTHON:-python3}" "$root/examples/stage_recovery.py" "$FOLDER" \
    --processes "$processes" --stages "${STAGES:-$processes}"
}

if [ -n "${flag_local-}" ]; then on_this_machine; else on_tpu; fi
