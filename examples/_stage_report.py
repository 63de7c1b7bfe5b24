"""For stage_recovery.py: what a loss cost, in words and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def report(facts: list[dict[str, Any]], launch: int, killed: list[int]) -> None:
    """What a loss cost, from what the processes told before and after."""
    before = [f for f in facts if f["launch"] == launch and f["kind"] in ("ready", "step")]
    after = {f["process"]: f for f in facts if f["launch"] == launch + 1 and f["kind"] == "ready"}
    event = next((f for f in facts if f["launch"] == launch + 1 and f["kind"] == "recovered"), None)
    if event is None:
        print(f"loss {launch + 1}, of {killed}: no stage was recovered; the step did not come, or all were lost")
        return
    survivors = [process for process in after if process not in killed]
    done = min(max(f["step"] for f in before if f["process"] == process) for process in survivors)
    kept = {(f["process"], f["bits"]) for f in before if f["step"] == event["step"]}
    same = all((process, after[process]["bits"]) in kept for process in survivors)
    was = next(f["held_out"] for f in before if f["step"] == event["step"])
    print(f"stages {event['lost']} came back by {event['sources']}: {event['why']}")
    print(f"  steps lost by the others: {max(0, done - event['step'])}; their stages to the bit as they were: {same}")
    print(f"  held-out loss at step {event['step']}: {was:.4f} before, {after[survivors[0]]['held_out']:.4f} after")


def plot(facts: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure  # no display is asked for

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for launch in sorted({f["launch"] for f in facts}):
        points = {f["step"]: f["held_out"] for f in facts if f["launch"] == launch and "held_out" in f and f["step"]}
        axes.plot(list(points), list(points.values()), ".-", label=f"launch {launch}")
    for fact in (f for f in facts if f["kind"] == "recovered" and f["process"] == 0):
        axes.axvline(fact["step"], color="grey", linestyle=":")
        axes.annotate(
            f"stages {fact['lost']}: {', '.join(fact['sources'])}",
            (fact["step"], axes.get_ylim()[1]),
            rotation=90,
            va="top",
        )
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")
