"""Subscribers of events: logs, progress, totals. The only place that logs, counts or draws."""

from jaxckpt.telemetry.bars import progress as progress
from jaxckpt.telemetry.log import log_to as log_to
from jaxckpt.telemetry.recorder import Recorder as Recorder

__all__ = ["Recorder", "log_to", "progress"]
