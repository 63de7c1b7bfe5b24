#!/usr/bin/env bash
# Ask for a TPU slice, or for several (multislice), and wait until it is there.
#
#   tpu_scripts/create.sh --name my-run --project p --zone us-east5-a --accelerator v5litepod-16 \
#     --runtime v2-alpha-tpuv5-lite [--slices 2] [--spot] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "spot" "$@"
need NAME PROJECT ZONE ACCELERATOR RUNTIME

request=(gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE"
  --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
if [ "$(slices)" -eq 1 ]; then
  request+=(--node-id="$NAME")
else
  request+=(--node-count="$(slices)" --node-prefix="$NAME")
fi
[ -z "${flag_spot-}" ] || request+=(--spot)
run "${request[@]}"

state=(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" "--format=value(state.state)")
if $dry_run; then
  run "${state[@]}"
  exit
fi
until [ "$(found=$("${state[@]}") && echo "$found")" = ACTIVE ]; do
  found=$("${state[@]}")
  echo "$NAME is $found"
  case $found in FAILED | SUSPENDED) fail "$NAME is $found: see gcloud compute tpus queued-resources describe $NAME" ;; esac
  sleep 20
done
