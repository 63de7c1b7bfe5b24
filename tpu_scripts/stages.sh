#!/usr/bin/env bash
# Train a pipeline over all workers of a slice, stages in the order of the workers. Each keeps its part in its machine's
# memory at every step; when one dies all are launched again, and the stage that has none left is refilled by the others.
#
#   tpu_scripts/stages.sh --name my-run --project p --zone us-east5-a --bucket gs://b/runs/1 [--stages 4] \
#     [--preset toy] [--steps 1000] [--save-every 100] [--launches 10] [--dry-run]
# --stages: a multiple of the number of workers; with --preset it divides the layers.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need NAME PROJECT ZONE BUCKET

program="examples/_stage_worker.py"
line="$program $BUCKET/checkpoints --memory /dev/shm/$NAME --stages ${STAGES:-4} --steps ${STEPS:-1000}"
line+=" --save-every ${SAVE_EVERY:-100} --distributed"
[ -z "${PRESET-}" ] || line+=" --preset $PRESET"
# What hangs in a collective since the last launch holds the chips.
clean="pkill -KILL -u \"\$USER\" -f '^[.]venv/bin/python $program'"
launch=1
until on_workers all "cd jaxckpt && { $clean; PYTHONPATH=. .venv/bin/python $line; }"; do
  [ "$launch" -lt "${LAUNCHES:-10}" ] || fail "launch $launch of ${LAUNCHES:-10} failed; what a worker wrote last says why"
  launch=$((launch + 1))
  echo "A worker is gone; launch $launch."
done
