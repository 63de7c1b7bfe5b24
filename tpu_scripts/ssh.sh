#!/usr/bin/env bash
# Train on machines that have nothing but ssh: one process each, with all its GPUs; the first is the coordinator.
# The repository lies in the same place on all of them.
#
#   tpu_scripts/ssh.sh --folder /shared/runs/1 --hosts gpu1,gpu2 [--port 9876] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need FOLDER HOSTS

IFS=, read -ra machines <<<"$HOSTS"
pids=()
for i in "${!machines[@]}"; do
  line="cd $(printf %q "$root") && PYTHONPATH=. .venv/bin/python $(train_command "$FOLDER") \
--coordinator ${machines[0]}:${PORT:-9876} --processes ${#machines[@]} --process $i"
  if $dry_run; then run ssh "${machines[$i]}" "$line"; else
    run ssh "${machines[$i]}" "$line" &
    pids+=($!)
  fi
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
