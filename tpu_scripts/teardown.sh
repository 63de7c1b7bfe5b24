#!/usr/bin/env bash
# Delete the TPUs and their queued resource. Checkpoints stay.
#
#   tpu_scripts/teardown.sh --name my-run --project p --zone us-east5-a [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need NAME PROJECT ZONE

run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
