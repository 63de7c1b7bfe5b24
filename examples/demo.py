"""Train, get killed, resume elsewhere, prove every bit: the main job of jaxckpt in about a minute.

Run it with ``make demo``, or ``python examples/demo.py --keep some/folder`` to look at the checkpoints afterwards.
Each act runs in processes of its own, as a real job does; this one starts them, kills one and shows what they report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _demo_screen import loss_line, say, table, title, verbatim

EXAMPLES = Path(__file__).resolve().parent
SAVE_EVERY = 6
KILL_AT = 3 * SAVE_EVERY
LAST_ON_8, LAST_ON_1 = 4 * SAVE_EVERY, 4 * SAVE_EVERY + 3
SAME_LOSS = 1e-4  # relative: other meshes add the same numbers in another order


def main() -> int:
    """The exit status is 0 only if every proof holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints, kept (default: a temporary one)")
    args = parser.parse_args()

    if args.keep and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: the folder is not empty")
    started = time.perf_counter()
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="jaxckpt-demo-"))).absolute()
    demo = Demo(folder)
    try:
        demo.run()
    except DemoError as error:
        say(f"\n[bold red]The demo stopped:[/] {error}")
        return 1
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.keep:
        say(f"\nThe checkpoints are in {demo.root}")
    return demo.verdict(time.perf_counter() - started)


class DemoError(Exception):
    """A process of the demo failed."""


class Demo:
    """The acts in order, and what has been proven so far."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkpoints"
        self.records = folder / "records"
        self.scratch = folder / "scratch"
        for path in (self.root, self.records, self.scratch):
            path.mkdir(parents=True, exist_ok=True)
        self.log = folder / "stderr.log"
        self.proofs: list[tuple[bool, str]] = []
        self.losses: dict[int, float] = {}  # of the run that was killed

    def run(self) -> None:
        say("[bold]jaxckpt demo[/]: a small Llama learns English from Python's own manual, on simulated devices")
        self.train_and_kill()
        self.resume("2x4", until=LAST_ON_8, act="2  Resume on a 2x4 mesh (it was 4x2)")
        self.resume("1x1", until=LAST_ON_1, act="3  Resume again, on one device")
        self.look_at(self.root / str(LAST_ON_8))
        self.compare(self.root / str(LAST_ON_8))

    def train_and_kill(self) -> None:
        title(f"1  Train on a 4x2 mesh of 8 devices, saving every {SAVE_EVERY} steps; kill it in the middle")
        say("  [dim]starting; JAX compiles for some seconds[/]")
        trainer = self.start_trainer("4x2", steps=10 * SAVE_EVERY)
        for event in trainer.events(limit_s=180):
            match event["kind"]:
                case "ready":
                    say(f"  {event['leaves']} arrays, {_mb(event['size_bytes'])}, data- and tensor-parallel")
                case "step":
                    self.losses[event["step"]] = event["loss"]
                    _show_step(event)
                case "saving":
                    _show_saving(event)
                    if event["step"] >= KILL_AT:
                        trainer.kill()
                        say(f"  [bold red]SIGKILL[/] while step {event['step']} was on its way to the disk")
        if not trainer.killed:
            trainer.must_succeed()
            raise DemoError("the trainer ended before it could be killed")

    def resume(self, mesh: str, *, until: int, act: str) -> None:
        title(act)
        where = "one device" if mesh == "1x1" else f"a {mesh} mesh"
        repeated: list[tuple[float, float]] = []
        resumed = False
        trainer = self.start_trainer(mesh, steps=until)
        for event in trainer.events(limit_s=120):
            match event["kind"]:
                case "restored":
                    resumed = True
                    self.judge_restored(event, where)
                case "ready":
                    say("  [dim]compiling the step for this mesh[/]")
                case "step":
                    before = self.losses.get(event["step"])
                    if before is not None:
                        repeated.append((before, event["loss"]))
                    _show_step(event, note="" if before is None else f"(before: {before:.4f})")
                case "saving":
                    _show_saving(event)
        trainer.must_succeed()
        if not resumed:
            raise DemoError(f"no committed step was found in {self.root}")
        if repeated:
            worst = max(_relative(*pair) for pair in repeated)
            self.prove(
                worst < 10 * SAME_LOSS,
                f"{len(repeated)} steps trained again on {where} had the loss they had before (within {worst:.0e})",
            )

    def judge_restored(self, event: dict[str, Any], where: str) -> None:
        if event["torn"]:
            say(f"  step {event['torn'][0]} was never committed and is not taken for a checkpoint")
        say(f"  restored step {event['step']} in {event['seconds']:.2f} s")
        self.prove(
            not event["differing"],
            f"all {event['leaves']} arrays of step {event['step']}, restored on {where}, are what was saved, to the bit"
            + _names(event["differing"]),
        )
        before, after = event["loss_saved"], event["loss_restored"]
        self.prove(
            _relative(before, after) < SAME_LOSS,
            f"the loss on unseen text goes on where it was: {before:.6f} when saved, {after:.6f} on {where}",
        )

    def look_at(self, checkpoint: Path) -> None:
        title("4  Look at it from the command line")
        for command in ("inspect", "verify"):
            say(f"  $ jaxckpt {command} {checkpoint.relative_to(self.root.parent)}")
            done = subprocess.run(
                [*_command_line(), command, str(checkpoint)], capture_output=True, text=True, check=False, timeout=60
            )
            verbatim(done.stdout + done.stderr)
            self.prove(done.returncode == 0, f"`jaxckpt {command}` finds the checkpoint in order")

    def compare(self, checkpoint: Path) -> None:
        title("5  The same folder with Orbax, and the same state saved by both")
        child = Child(
            EXAMPLES / "_demo_compare.py",
            ["--checkpoint", checkpoint, "--records", self.records, "--scratch", self.scratch, "--mesh", "4x2"],
            devices=8,
            log=self.log,
        )
        version, timed = "", {}
        for event in child.events(limit_s=240):
            match event["kind"]:
                case "orbax_read":
                    version = event["version"]
                    self.prove(
                        not event["differing"],
                        f"Orbax {version} restores our folder onto 4x2: all {event['leaves']} arrays equal to the bit"
                        + _names(event["differing"]),
                    )
                case "damaged":
                    self.prove(event["error"] is not None, "a copy with one flipped bit is refused, not loaded")
                    verbatim(event["error"] or "no error", max_lines=4)
                case "timing":
                    say(f"  timing saves and restores of {event['what']}")
                case "round":
                    say(f"    round {event['done']} of {event['of']}" + ("" if event["done"] else " (warm-up)"))
                case "timed":
                    timed[event["what"]] = event
        child.must_succeed()
        if len(timed) < 2:
            raise DemoError("the comparison ended without its times")
        show_times(timed, version)

    def start_trainer(self, mesh: str, *, steps: int) -> Child:
        data, model = map(int, mesh.split("x"))
        return Child(
            EXAMPLES / "_demo_train.py",
            ["--root", self.root, "--records", self.records, "--mesh", mesh]
            + ["--steps", steps, "--save-every", SAVE_EVERY],
            devices=data * model,
            log=self.log,
        )

    def prove(self, holds: bool, claim: str) -> None:
        self.proofs.append((holds, claim))
        say(f"  [bold green]✓[/] {claim}" if holds else f"  [bold red]✗ FAILED:[/] {claim}")

    def verdict(self, seconds: float) -> int:
        failed = [claim for holds, claim in self.proofs if not holds]
        if failed:
            say(f"\n[bold red]{len(failed)} of {len(self.proofs)} proofs failed[/] after {seconds:.0f} s:")
            for claim in failed:
                say(f"  {claim}")
            return 1
        say(f"\n[bold green]All {len(self.proofs)} proofs hold.[/] {seconds:.0f} s in all.")
        return 0


class Child:
    """A process of the demo and the events that it prints, one line of JSON each."""

    def __init__(self, script: Path, arguments: list[object], *, devices: int, log: Path) -> None:
        self.script, self.log = script, log
        self.killed, self.problem = False, ""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # `models` is found from here even where the package was not installed as editable.
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(EXAMPLES.parent)])),
        }
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def events(self, *, limit_s: float) -> Iterator[dict[str, Any]]:
        """Everything the process reports until it ends; it is killed when it takes too long or nobody listens."""
        alarm = threading.Timer(limit_s, self._give_up, (limit_s,))
        alarm.daemon = True
        alarm.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if self.killed:
                    break  # what was in the pipe when the process died is not news
                yield json.loads(line)
            self.process.wait()
        finally:
            alarm.cancel()
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """As a preempted machine does: at once, no clean-up."""
        self.process.kill()
        self.killed = True

    def must_succeed(self) -> None:
        if self.process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            verbatim(tail, max_lines=25)
            raise DemoError(f"{self.script.name} {self.problem or f'ended with status {self.process.returncode}'}")

    def _give_up(self, limit_s: float) -> None:
        self.problem = f"took longer than {limit_s:.0f} s"
        self.process.kill()


def show_times(timed: dict[str, Any], version: str) -> None:
    rows = []
    for tree in ("state", "many"):
        for what in ("save", "stall", "restore"):
            ours, orbax, raw = (timed[tree][name][what] for name in ("jaxckpt", "orbax", "orbax_raw"))
            times = [f"{t * 1e3:.0f} ms" for t in (ours, orbax, raw)]
            rows.append([f"{tree}: {what}", *times, f"{_ratio(orbax / ours)} / {_ratio(raw / ours)}"])
    say()
    table(
        "Times on this machine (median of 3 rounds, interleaved)",
        ["", "jaxckpt", f"Orbax {version}", "uncompressed", "Orbax / ours, uncompressed / ours"],
        rows,
    )
    say("  [dim]save: until all is on the disk; stall: until training goes on; restore: until every array is there[/]")
    say("  [dim]state: the one trained above; many: 500 arrays of 16 KiB, each over all 8 devices[/]")


def _ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x"


def _show_step(event: dict[str, Any], *, note: str = "") -> None:
    if event["step"] % 3 == 0 or note:
        loss_line(event["step"], event["loss"], note=note)


def _show_saving(event: dict[str, Any]) -> None:
    stall_ms = event["stall_s"] * 1e3
    say(f"  step {event['step']:3d}  [yellow]saving[/] in the background; training waited {stall_ms:.0f} ms")


def _command_line() -> list[str]:
    installed = Path(sys.executable).with_name("jaxckpt")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "jaxckpt.cli.main"]


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), 1e-12)


def _names(differing: list[str]) -> str:
    return f" - but these differ: {', '.join(differing[:5])}" if differing else ""


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
