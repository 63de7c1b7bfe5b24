#!/usr/bin/env bash
# Run examples/save_restore.py on every worker (after setup.sh): save, restore on another mesh and back, compare.
#
#   tpu_scripts/save_restore.sh --name my-run --project p --zone us-east5-a --bucket gs://b/check [--preset 124m] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need NAME PROJECT ZONE BUCKET

path=$BUCKET/save-restore-$(date -u +%Y%m%dT%H%M%SZ)
on_workers all "cd jaxckpt && PYTHONPATH=. .venv/bin/python examples/save_restore.py --distributed --preset ${PRESET:-124m} $path"
