"""A step without the metric that steps are kept by is told of, once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core.events import MetricMissing, subscribe
from jaxckpt.telemetry import log_to

if TYPE_CHECKING:
    from pathlib import Path

TREE = {"w": np.arange(8, dtype=np.float32)}


def told(path: Path, keep: Any, metrics: list[dict[str, float] | None]) -> list[tuple[int, str]]:
    heard: list[Any] = []
    stop = subscribe(heard.append)
    with jc.CheckpointManager(path, keep=keep) as manager:
        for step, one in enumerate(metrics):
            manager.save(step, TREE, metrics=one)
            manager.wait()
    stop()
    return [(event.step, event.metric) for event in heard if isinstance(event, MetricMissing)]


def test_the_first_step_that_lacks_the_metric_is_told_and_no_other(tmp_path: Path) -> None:
    keep = jc.latest(2) | (jc.best(1, "loss") & jc.every(steps=1))
    assert told(tmp_path, keep, [{"loss": 1.0}, None, {"accuracy": 1.0}, {"loss": 2.0}]) == [(1, "loss")]


def test_each_metric_is_told_of(tmp_path: Path) -> None:
    keep = jc.best(1, "loss") | jc.best(1, "accuracy", "max")
    assert told(tmp_path, keep, [{"loss": 1.0}, None]) == [(0, "accuracy"), (1, "loss")]


@pytest.mark.parametrize("keep", [None, jc.latest(1)])
def test_no_metric_is_missed_where_none_is_compared(tmp_path: Path, keep: Any) -> None:
    assert told(tmp_path, keep, [None, None]) == []


def test_the_log_warns_with_the_metric_and_the_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = log_to("jaxckpt")
    told(tmp_path, jc.best(1, "loss"), [None, None])
    stop()
    (record,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "(step 0) without the metric 'loss'" in record.getMessage()
