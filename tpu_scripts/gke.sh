#!/usr/bin/env bash
# Train as a JobSet on GKE: prints the manifest jobset.yaml, filled in, and applies it. --delete removes the job.
#
#   tpu_scripts/gke.sh --name my-run --bucket gs://b/runs/1 --image europe-docker.pkg.dev/p/r/jaxckpt:1 \
#     --accelerator tpu-v5-lite-podslice --topology 4x4 [--nodes-per-slice 4] [--chips-per-node 4] [--slices 2] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "delete" "$@"
need NAME
if [ -n "${flag_delete-}" ]; then
  run kubectl delete jobset "$NAME"
  exit
fi
need BUCKET IMAGE ACCELERATOR TOPOLOGY

manifest=$(sed -e "s|@NAME@|$NAME|; s|@IMAGE@|$IMAGE|; s|@ACCELERATOR@|$ACCELERATOR|; s|@TOPOLOGY@|$TOPOLOGY|" \
  -e "s|@SLICES@|$(slices)|; s|@NODES@|${NODES_PER_SLICE:-4}|; s|@CHIPS@|${CHIPS_PER_NODE:-4}|" \
  -e "s|@COMMAND@|python $(train_command "$BUCKET") --distributed|" "$scripts/jobset.yaml")
echo "$manifest"
run kubectl apply -f - <<<"$manifest"
