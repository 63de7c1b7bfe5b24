"""For stage_recovery.py: start the processes of a pipeline, and all of them again when one has died."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER, CANNOT_GO_ON = Path(__file__).with_name("_stage_worker.py"), 2
GRACE_S = 2.0  # for survivors to finish their step and leave by themselves; one may hang in a collective for ever
Workers = list[subprocess.Popen[str]]


@dataclass
class Supervisor:
    """Runs a job to its end. ``losses[i]``: the step after which, in launch i, which processes are killed."""

    folder: Path
    memory: Path
    processes: int
    devices: int  # of each process: one per stage
    options: list[str]
    losses: list[tuple[int, list[int]]]
    facts: list[dict[str, Any]] = field(default_factory=list)  # what workers told, each with its "launch"

    def run(self) -> None:
        for launch in range(1 + len(self.losses)):
            workers, ended = self.start(launch), queue.Queue()
            for process in range(self.processes):
                threading.Thread(target=self.listen, args=(launch, process, workers, ended), daemon=True).start()
            first = watch(workers, ended)
            codes = [worker.wait() for worker in workers]
            if not any(codes):
                return
            if CANNOT_GO_ON in codes:
                errors = (self.folder / f"errors-{launch}-{codes.index(CANNOT_GO_ON)}.txt").read_text()
                raise SystemExit(f"The job cannot go on:\n{errors[max(0, errors.rfind('InvalidArgumentError')) :]}")
            if not (dead := [process for process in first if codes[process] == -signal.SIGKILL]):
                died = next(process for process in first if codes[process])
                errors = (self.folder / f"errors-{launch}-{died}.txt").read_text().strip()
                raise SystemExit(f"Process {died} ended by itself with exit code {codes[died]}:\n{errors[-2000:]}")
            print(f"launch {launch}: exit codes {codes}, so process {dead} is gone; all are launched again", flush=True)
            for process in dead:  # a replacement on another machine would not find it
                shutil.rmtree(self.memory / str(process), ignore_errors=True)
        raise SystemExit(f"A process died that was not to be killed: exit codes {codes}, see {self.folder}.")

    def start(self, launch: int) -> Workers:
        with socket.socket() as probe:  # at a new port: the old one may still be taken
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(WORKER), str(self.folder / "checkpoints"), "--memory", str(self.memory)]
        command += ["--cache", str(self.folder / "compiled"), *self.options]
        command += ["--coordinator", f"localhost:{port}", "--processes", str(self.processes)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
        env |= {"JAX_NUM_CPU_DEVICES": str(self.devices), "XLA_FLAGS": os.environ.get("WORKER_XLA_FLAGS", "")}
        workers = []
        for process in range(self.processes):
            with (self.folder / f"errors-{launch}-{process}.txt").open("w") as errors:
                line = [*command, "--process", str(process)]
                workers.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=env))
        return workers

    def listen(self, launch: int, process: int, workers: Workers, ended: queue.Queue[int]) -> None:
        """Gather what a worker tells until it ends; when it is a victim and its step is done, kill."""
        step, victims = self.losses[launch] if launch < len(self.losses) else (-1, [])
        with workers[process].stdout or open(os.devnull) as lines:
            for line in lines:
                if line.startswith("{") and line.endswith("}\n"):  # libraries print too
                    self.facts.append(fact := json.loads(line) | {"launch": launch})
                    if victims[:1] == [process] and (fact["kind"], fact.get("step")) == ("step", step):
                        for victim in victims:
                            workers[victim].send_signal(signal.SIGKILL)
        ended.put(process)


def watch(workers: Workers, ended: queue.Queue[int]) -> list[int]:
    """Wait for the end of all; returns which ended, in order. What then hangs in a collective is killed."""
    order, until = [], None
    while len(order) < len(workers):
        try:
            order.append(ended.get(timeout=None if until is None else max(0.0, until - time.monotonic())))
        except queue.Empty:
            for process in set(range(len(workers))).difference(order):
                workers[process].kill()
            break
        if workers[order[-1]].wait() and until is None:
            until = time.monotonic() + GRACE_S
    return order
