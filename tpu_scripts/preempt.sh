#!/usr/bin/env bash
# Do to a run what a preemption does: SIGTERM on one worker, so that all save the same step and end.
# With --hard it is SIGKILL: nothing is saved any more, and the run must go on from its newest checkpoint.
#
#   tpu_scripts/preempt.sh --name my-run --project p --zone us-east5-a [--worker 0] [--hard] [--dry-run]
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "hard" "$@"
need NAME PROJECT ZONE

signal=TERM
[ -z "${flag_hard-}" ] || signal=KILL
tpu_ssh "$(nodes | head -n 1)" "${WORKER:-0}" "pkill -$signal -u \"\$USER\" -f '^[.]venv/bin/python tpu_scripts/train.py'" # not the shell that waits for it
