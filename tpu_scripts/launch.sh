#!/usr/bin/env bash
# Train on every worker of every slice. A run that was interrupted goes on from its newest checkpoint.
#
#   tpu_scripts/launch.sh --name my-run --project p --zone us-east5-a --bucket gs://b/runs/1 [--slices 2] \
#     [--preset 124m] [--steps 1000] [--save-every 100] [--mesh 8x2] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need NAME PROJECT ZONE BUCKET

on_workers all "cd jaxckpt && PYTHONPATH=. .venv/bin/python $(train_command "$BUCKET") --distributed"
