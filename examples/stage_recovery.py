"""A pipeline loses a stage's process to SIGKILL and trains on: no checkpoint is read, and no other stage goes back.

python examples/stage_recovery.py FOLDER [--kill STEP:PROCESS[,PROCESS] ...] [--seed 7]
python examples/stage_recovery.py FOLDER --simulate        (in one process, with two simulated devices per stage)

One process per stage (or --processes 2: per group of them) trains under a supervisor; --stages 4 is the default. Each
keeps its own part outside of itself, in /dev/shm. When one dies, all are launched again: the others bring their parts
back as they were, the new one starts empty and is filled from the copy of its stage on the next one, an average of its
neighbours, or a checkpoint, whichever costs least. Writes FOLDER/loss.png.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _stage_report import plot, report
from _stage_supervisor import Supervisor

Losses = list[tuple[int, list[int]]]


def main() -> None:
    args, options = arguments()
    folder = Path(args.folder)
    if (folder / "facts.jsonl").exists():
        raise SystemExit(f"{folder} holds a run already: give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    rng = random.Random(seed)
    losses = args.kill or [(rng.randint(8, 30), [rng.randrange(args.processes)])]
    print(f"seed {seed}: lost after step: {dict(losses)}", flush=True)
    facts = simulated(args, folder, options, losses) if args.simulate else supervised(args, folder, options, losses)
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    for launch, (_, lost) in enumerate(losses):
        report(facts, launch, lost)
    plot(facts, folder / "loss.png")


def supervised(args: argparse.Namespace, folder: Path, options: list[str], losses: Losses) -> list[dict[str, Any]]:
    memory = Path(tempfile.mkdtemp(prefix="stages-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    each = args.stages // args.processes
    job = Supervisor(folder, memory, args.processes, devices=each, options=options, losses=losses)
    try:
        job.run()
    finally:
        shutil.rmtree(memory)
    return job.facts


def simulated(args: argparse.Namespace, folder: Path, options: list[str], losses: Losses) -> list[dict[str, Any]]:
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(2 * args.stages),
        "XLA_FLAGS": os.environ.get("WORKER_XLA_FLAGS", ""),
    }
    from _stage_simulate import simulate

    return simulate(str(folder / "checkpoints"), options, losses)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    kill = "STEP:PROCESS[,PROCESS] (with --simulate: stages); several times, in order, for several losses"
    parser.add_argument("--kill", action="append", type=loss, help=kill)
    parser.add_argument("--seed", type=int, help="of the step and the process that --kill does not name")
    parser.add_argument("--processes", type=int, help="one per stage if not given")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--simulate", action="store_true", help="in one process, with two simulated devices per stage")
    args, options = parser.parse_known_args()
    if args.processes is None or args.simulate:
        args.processes = args.stages
    if args.processes < 1 or args.stages % args.processes:
        parser.error(f"--processes {args.processes} does not divide --stages {args.stages}: every process has as many.")
    for step, processes in args.kill or []:
        if unknown := [p for p in processes if p >= args.processes]:
            parser.error(f"--kill {step}:{unknown[0]}: processes are 0 to {args.processes - 1}.")
    return args, [*options, "--stages", str(args.stages)]


def loss(text: str) -> tuple[int, list[int]]:
    if not re.fullmatch(r"\d+:\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not STEP:PROCESS[,PROCESS], such as 12:0 or 24:1,2.")
    step, processes = text.split(":")
    return int(step), [int(process) for process in processes.split(",")]


if __name__ == "__main__":
    main()
