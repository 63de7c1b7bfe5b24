#!/usr/bin/env bash
# Go on with a run, on the TPU it ran on or another: what launch.sh does, for a TPU that was preempted or replaced.
# Takes the options of create.sh, setup.sh and launch.sh; with --create the TPU is asked for anew first.
#
#   tpu_scripts/resume.sh --name my-run-2 --project p --zone us-east5-a --bucket gs://b/runs/1 \
#     [--create --accelerator v5litepod-8 --runtime v2-alpha-tpuv5-lite] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "create" "$@"
need NAME PROJECT ZONE BUCKET

export NAME PROJECT ZONE BUCKET SLICES ACCELERATOR RUNTIME PRESET STEPS SAVE_EVERY MESH
dry=()
! $dry_run || dry=(--dry-run)
if [ -n "${flag_create-}" ]; then
  "$scripts/create.sh" "${dry[@]}"
  "$scripts/setup.sh" "${dry[@]}"
fi
"$scripts/launch.sh" "${dry[@]}"
