#!/usr/bin/env bash
# Lose a worker in the middle of a run, and go on from the newest checkpoint on another topology.
#
# On TPUs, with the options of create.sh, setup.sh and launch.sh (the run lasts a few minutes; both slices are deleted):
#   tpu_scripts/drill.sh --name drill --project p --zone us-east5-a --runtime v2-alpha-tpuv5-lite \
#     --accelerator v5litepod-16 --to-accelerator v5litepod-8 --bucket gs://b/drill [--slices 2] [--dry-run]
# On this machine, with processes in place of workers (4 devices each before, 2 after; needs jax and flax):
#   tpu_scripts/drill.sh --local [--folder /tmp/drill] [--processes 2] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "local" "$@"

on_tpu() {
  need NAME PROJECT ZONE ACCELERATOR TO_ACCELERATOR RUNTIME BUCKET
  export NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET SLICES PRESET STEPS SAVE_EVERY MESH
  local launched=
  dry=() # not local: the trap reads it when this function is over
  ! $dry_run || dry=(--dry-run)
  trap '"$scripts/teardown.sh" "${dry[@]}"' EXIT
  "$scripts/create.sh" "${dry[@]}"
  "$scripts/setup.sh" "${dry[@]}"
  "$scripts/launch.sh" "${dry[@]}" &
  launched=$!
  until_saved
  WORKER=1 "$scripts/preempt.sh" --hard "${dry[@]}"
  wait "$launched" || echo "The run has ended, as it should: a worker is gone."
  "$scripts/teardown.sh" "${dry[@]}"
  # A mesh that was given was for the first slice.
  NAME=$NAME-2 ACCELERATOR=$TO_ACCELERATOR SLICES=1 MESH='' "$scripts/resume.sh" --create "${dry[@]}"
  NAME=$NAME-2 "$scripts/teardown.sh" "${dry[@]}"
  trap - EXIT
}

# Until a checkpoint is committed in the bucket: its marker is there.
until_saved() {
  local look=(gcloud storage ls "$BUCKET/*/commit_success.txt")
  if $dry_run; then run "${look[@]}"; return; fi
  until "${look[@]}" 2>/dev/null; do sleep 10; done
}

on_this_machine() {
  local processes=${PROCESSES:-2} python=${PYTHON:-python3} victim status=0
  folder=${FOLDER:-} # not local: the trap reads it when this function is over
  [ "$processes" -gt 1 ] || fail "--processes must be 2 or more: one is killed, others must notice"
  [ -n "$folder" ] || { folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT; }
  pids=()
  start "$processes" 4 100
  if ! $dry_run; then
    victim=${pids[1]}
    # Two saves are durable, and a third may be under way.
    until grep -q '"durable".*"step": 10' "$folder/log-0"; do
      kill -0 "$victim" 2>/dev/null || fail_with_logs "worker 1 ended before anything was saved"
      sleep 0.2
    done
    run kill -KILL "$victim"
    timeout 10 tail -f /dev/null --pid="${pids[0]}" || true # the others end when they miss it, or hang
    kill -KILL "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
    grep -h -e '"saving"' "$folder/log-0" >"$folder/before"
  else
    run kill -KILL "the process id of worker 1"
  fi
  # As many processes again, and one more, with half the devices each: another topology.
  pids=()
  start $((processes + 1)) 2 20
  $dry_run && return
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  [ "$status" -eq 0 ] || fail_with_logs "the resumed run failed"
  compare
}

# start PROCESSES DEVICES STEPS: the training program in the background, one process per worker.
start() {
  local count=$1 devices=$2 steps=$3 port i line
  port=${PORT:-9876}
  if [ -z "${PORT-}" ] && ! $dry_run; then
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  fi
  for ((i = 0; i < count; i++)); do
    line=(env PYTHONPATH="$root" JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" XLA_FLAGS="" "$python" "$root/tpu_scripts/train.py"
      "$folder/run" --preset "${PRESET:-tiny}" --steps "$steps" --save-every 5 --batch 1 --length 16
      --coordinator "127.0.0.1:$port" --processes "$count" --process "$i")
    printf '+%s\n' "$(printf ' %q' "${line[@]}")"
    $dry_run || { : >"$folder/log-$i"; "${line[@]}" >"$folder/log-$i" 2>&1 & pids+=($!); }
  done
}

# What was restored is, to the bit, what was saved.
compare() {
  local restored step digest
  restored=$(grep -h '"restored"' "$folder/log-0") || fail_with_logs "the second run restored nothing"
  [[ $restored =~ \"step\":\ ([0-9]+).*\"digest\":\ \"([0-9a-f]+)\" ]] || fail_with_logs "no digest in $restored"
  step=${BASH_REMATCH[1]} digest=${BASH_REMATCH[2]}
  grep -q "\"step\": $step, \"digest\": \"$digest\"" "$folder/before" || fail_with_logs "step $step came back with other bits"
  grep -q '"done"' "$folder/log-0" || fail_with_logs "the resumed run did not end"
  echo "Worker 1 of $processes was killed; step $step came back to the bit on $((processes + 1)) processes, and the run ended."
}

fail_with_logs() {
  tail -n 40 "$folder"/log-* >&2
  kill -KILL "${pids[@]}" 2>/dev/null || true
  fail "$1"
}

if [ -n "${flag_local-}" ]; then on_this_machine; else on_tpu; fi
