#!/usr/bin/env bash
# Copy this repository (what is committed) to every worker and install it there.
#
#   tpu_scripts/setup.sh --name my-run --project p --zone us-east5-a [--slices 2] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need NAME PROJECT ZONE

archive=${TMPDIR:-/tmp}/jaxckpt-$$.tar.gz
trap 'rm -f "$archive"' EXIT
run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
for node in $(nodes); do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:jaxckpt.tar.gz" --project="$PROJECT" --zone="$ZONE" --worker=all
done
on_workers all "rm -rf jaxckpt && mkdir jaxckpt && tar -xzf jaxckpt.tar.gz -C jaxckpt && cd jaxckpt && python3 -m venv .venv && .venv/bin/pip install -q -e '.[flax]' 'jax[tpu]'"
