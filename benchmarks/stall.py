"""What a save costs the training loop: time blocked, steps slowed, CPU spent, memory kept.

Beside Orbax's AsyncCheckpointer (v0 with its defaults, and uncompressed), all in the same interleaved rounds. On a GPU
also the rate at which each mode moves bytes to the host: python benchmarks/stall.py [--quick]
"""

# ruff: noqa: E402, TC003 - the devices must be chosen before jax is imported; one block of imports
from __future__ import annotations

import os
import sys

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the reference models

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from _common import (
    MIB,
    Report,
    Row,
    Samples,
    Table,
    emptied,
    finish,
    interleave,
    parser,
    ratio,
    scratch,
    seconds,
    touch,
)
from _contenders import OURS, V0, V0_PLAIN
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from models.llama import PRESETS
from models.training import init_state, train_step

MODES = ("pinned", "clone", "split")
IN_STEP = "jaxckpt in_step"


class Sizes(NamedTuple):
    rounds: int
    large_bytes: int
    small: int  # replicated leaves of 16 KiB
    preset: str
    steps: int  # timed with and without a save
    saves: int  # in a row, for memory, files and threads


FULL = Sizes(rounds=5, large_bytes=768 * MIB, small=2000, preset="demo", steps=12, saves=100)
QUICK = Sizes(rounds=3, large_bytes=256 * MIB, small=2000, preset="demo", steps=6, saves=40)
TINY = Sizes(rounds=1, large_bytes=2 * MIB, small=20, preset="tiny", steps=2, saves=6)

Start = Callable[[Path, Any], Callable[[], None]]  # begin a save; returns what waits for it


def main() -> None:
    args = parser(__doc__).parse_args()
    sizes = TINY if args.tiny else QUICK if args.quick else FULL
    rounds = args.rounds or sizes.rounds
    report = Report("Saves beside training")
    with scratch(args.root) as folder:
        blocked(report, folder, sizes, rounds)
        many_small(report, folder, sizes, rounds)
        beside_training(report, folder, sizes, rounds)
        in_a_row(report, folder, sizes)
        if jax.default_backend() != "cpu":
            transfer_rates(report, folder, sizes, rounds)
    report.acceptance.sort(key=lambda row: row.number)
    finish(report, args)


def starters() -> dict[str, Start]:
    def orbax(checkpointer: ocp.AsyncCheckpointer, path: Path, tree: Any) -> Callable[[], None]:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
        return checkpointer.wait_until_finished

    found: dict[str, Start] = {OURS: partial(ours, "auto")}
    found |= {f"{OURS} {mode}": partial(ours, mode) for mode in MODES}
    for name, compressed in ((V0, True), (V0_PLAIN, False)):
        checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=compressed))
        found[name] = partial(orbax, checkpointer)
    return found


def ours(mode: Any, path: Path, tree: Any) -> Callable[[], None]:
    return jc.save_async(path, tree, capture=mode).result


def measured(start: Callable[[], Callable[[], None]], *, after: Callable[[], Any], memory: int) -> dict[str, float]:
    """Seconds blocked, until durable, and of CPU; ``after`` is what training does as soon as the call returns."""
    os.sync()
    touch(memory)
    cpu, thread, began = time.process_time(), time.thread_time(), time.perf_counter()
    wait = start()
    found = {"blocked": time.perf_counter() - began, "blocked CPU": time.thread_time() - thread}
    found["process CPU"] = time.process_time() - cpu
    after()
    wait()
    found["durable"] = time.perf_counter() - began
    found["CPU"] = time.process_time() - cpu
    return found


def blocked(report: Report, folder: Path, sizes: Sizes, rounds: int) -> None:
    """One large state on one device, made and then donated by a step, so that captures must hold.

    No memory is touched ahead. On some virtual machines the whole process faults its pages in anew once it has given
    back that much, and the call takes many times as long: that tells of the benchmark and of no training loop.
    """
    rows = 1024
    columns = sizes.large_bytes // 8 // rows // 4
    step = jax.jit(lambda state: jax.tree.map(lambda a: a * np.float32(1.0001), state), donate_argnums=0)
    rng = np.random.default_rng(0)
    held = {"state": {f"layer_{i}": jnp.asarray(rng.normal(size=(rows, columns)).astype(np.float32)) for i in range(8)}}
    capturing = jc.with_capture(lambda state: jax.tree.map(lambda a: a * np.float32(1.0001), state))

    def advance() -> None:
        held["state"] = step(held["state"])

    def contender(name: str, start: Start, turn: int) -> Mapping[str, float]:
        advance()
        jax.block_until_ready(held["state"])
        path = emptied(folder / "blocked")
        del turn
        return measured(lambda: start(path, held["state"]), after=advance, memory=0)

    def in_step(turn: int) -> Mapping[str, float]:
        del turn
        jax.block_until_ready(held["state"])
        path = emptied(folder / "blocked")
        held["state"], before = capturing.capture(held["state"])
        jax.block_until_ready(held["state"])

        def start() -> Callable[[], None]:
            return jc.save_async(path, before).result

        return measured(start, after=advance, memory=0)

    contenders: dict[str, Callable[[int], Mapping[str, float]]] = {
        name: partial(contender, name, start) for name, start in starters().items()
    }
    contenders[IN_STEP] = in_step
    taken = interleave(contenders, rounds=rounds)
    columns_ = ("", "blocked, s", "durable, s", "blocked / Orbax")
    report.add(
        Table(
            title=f"Blocked by a save of {sizes.large_bytes // MIB} MiB in 8 leaves, donated as soon as it returns",
            columns=columns_,
            rows=[
                (
                    name,
                    seconds(found["blocked"]),
                    seconds(found["durable"]),
                    f"{ratio(found['blocked'], taken[V0]['blocked']):.3f}",
                )
                for name, found in taken.items()
            ],
            note="Orbax is v0 with its defaults (zstd). Durable counts the donating step, which runs meanwhile.",
        )
    )
    best = min((V0, V0_PLAIN), key=lambda name: median(taken[name]["blocked"]))
    found = ratio(taken[OURS]["blocked"], taken[best]["blocked"])
    report.judge(
        Row(
            number=1,
            what=f"time save_async blocks, {sizes.large_bytes // MIB} MiB, over {best} async",
            measured=f"{found:.3f}",
            must="<= 0.25",
            ok=found <= 0.25,
        )
    )
    spent(report, folder, sizes, rounds, held["state"])


def spent(report: Report, folder: Path, sizes: Sizes, rounds: int, state: Any) -> None:
    """CPU of a save alone: nothing trains meanwhile, so nothing else is counted."""

    def contender(start: Start, turn: int) -> Mapping[str, float]:
        del turn
        path = emptied(folder / "spent")
        return measured(lambda: start(path, state), after=lambda: None, memory=sizes.large_bytes)

    chosen = {name: start for name, start in starters().items() if name in (OURS, f"{OURS} pinned", V0, V0_PLAIN)}
    taken = interleave({n: partial(contender, s) for n, s in chosen.items()}, rounds=rounds)
    gib = sizes.large_bytes / 2**30
    report.add(
        Table(
            title=f"CPU of a save of {sizes.large_bytes // MIB} MiB, nothing else running",
            columns=("", "CPU s per GiB, all threads", "durable, s"),
            rows=[
                (name, seconds([cpu / gib for cpu in found["CPU"]]), seconds(found["durable"]))
                for name, found in taken.items()
            ],
        )
    )
    mine = median(taken[OURS]["CPU"]) / gib
    report.judge(Row(number=4, what="CPU seconds per GiB saved", measured=f"{mine:.2f}", must="<= 1.0", ok=mine <= 1.0))


def many_small(report: Report, folder: Path, sizes: Sizes, rounds: int) -> None:
    mesh = whole_mesh()
    home = NamedSharding(mesh, P())
    rng = np.random.default_rng(0)
    tree = {f"leaf_{i}": jax.device_put(rng.normal(size=(64, 64)).astype(np.float32), home) for i in range(sizes.small)}
    jax.block_until_ready(tree)
    chosen = {name: start for name, start in starters().items() if name != V0_PLAIN}

    def contender(start: Start, turn: int) -> Mapping[str, float]:
        del turn
        path = emptied(folder / "small")
        return measured(lambda: start(path, tree), after=lambda: None, memory=64 * MIB)

    # Orbax is slow here: few rounds tell enough.
    taken = interleave({n: partial(contender, s) for n, s in chosen.items()}, rounds=min(rounds, 3))
    report.add(
        Table(
            title=f"Blocked by a save of {sizes.small:,} leaves of 16 KiB, replicated on {mesh.size} devices",
            columns=("", "blocked, s", "CPU of the caller, s", "CPU of the process meanwhile, s", "durable, s"),
            rows=[
                (name, *(seconds(found[k]) for k in ("blocked", "blocked CPU", "process CPU", "durable")))
                for name, found in taken.items()
            ],
        )
    )
    spent = median(taken[OURS]["process CPU"])
    report.judge(
        Row(
            number=2,
            what=f"CPU while save_async blocks, {sizes.small:,} replicated leaves on {mesh.size} devices",
            measured=f"{spent:.3f} s",
            must="<= 0.1 s",
            ok=spent <= 0.1,
        )
    )


def beside_training(report: Report, folder: Path, sizes: Sizes, rounds: int) -> None:
    """Steps of an nnx LLaMA while saves run, over steps of the same round without."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    config = PRESETS[sizes.preset]
    step = train_step(config, mesh)
    tokens = jax.device_put(np.random.default_rng(0).integers(0, config.vocab, (4, 65)).astype(np.int32))
    held = {"state": init_state(config, mesh)}

    def advance() -> float:
        began = time.perf_counter()
        held["state"], loss = step(held["state"], tokens)
        jax.block_until_ready((held["state"], loss))
        return time.perf_counter() - began

    def contender(start: Start, turn: int) -> Mapping[str, float]:
        del turn
        path = emptied(folder / "beside")
        os.sync()
        alone = median([advance() for _ in range(sizes.steps)])
        began = time.perf_counter()
        wait = start(path, held["state"])
        stall = time.perf_counter() - began
        ended = threading.Event()
        waiter = threading.Thread(target=lambda: (wait(), ended.set()))
        waiter.start()
        during: list[float] = []
        # As many steps for a short save as for a long one: else the short one looks worse for being done sooner.
        while not ended.is_set() or len(during) < sizes.steps:
            during.append(advance())
        waiter.join()
        # All that the save cost the loop: the call, and what each step took longer, until it was durable.
        cost = stall + sum(during) - alone * len(during)
        return {"slower": (sum(during) / len(during)) / alone, "cost": cost, "alone": alone, "steps": len(during)}

    chosen = {name: start for name, start in starters().items() if name in (OURS, V0, V0_PLAIN, f"{OURS} clone")}
    taken = interleave({n: partial(contender, s) for n, s in chosen.items()}, rounds=rounds)
    report.add(
        Table(
            title=f"Steps of an nnx LLaMA ({sizes.preset}) while its state is saved",
            columns=("", "step alone, s", "step beside a save / alone", "steps counted", "cost of a save, s"),
            rows=[
                (
                    name,
                    seconds(found["alone"]),
                    f"{median(found['slower']):.2f}",
                    f"{median(found['steps']):.0f}",
                    seconds(found["cost"]),
                )
                for name, found in taken.items()
            ],
            note="The cost is what the loop lost: time blocked, and what steps took longer until the save ended.",
        )
    )
    mine, theirs = median(taken[OURS]["slower"]), min(median(taken[name]["slower"]) for name in (V0, V0_PLAIN))
    report.judge(
        Row(
            number=3,
            what=f"time of {sizes.steps} steps from the start of a save over steps without, ours and Orbax's",
            measured=f"{mine:.2f}, {theirs:.2f}",
            must="ours <= Orbax's",
            ok=mine <= theirs,
        )
    )


def in_a_row(report: Report, folder: Path, sizes: Sizes) -> None:
    """Memory, files and threads after many saves, over those after half of them."""
    mesh = whole_mesh()
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + np.float32(1), state), donate_argnums=0)
    held: dict[str, Any] = {
        "jax": jax.device_put(np.ones((1024, 1024), np.float32), NamedSharding(mesh, P("data"))),
        "small": [jnp.ones((64, 64)) for _ in range(50)],
    }
    owned = np.ones((512, 1024), np.float32)
    marks: list[tuple[int, int, int]] = []
    modes = ("auto", *MODES)
    for number in range(sizes.saves):
        mode: Any = modes[number % len(modes)]
        held = step(held)
        pending = jc.save_async(emptied(folder / "row"), {**held, "numpy": owned}, capture=mode)
        held = step(held)
        pending.result()
        if number in (sizes.saves // 2 - 1, sizes.saves - 1):
            marks.append(standing())
    (rss, files, threads), (rss_end, files_end, threads_end) = marks[0], marks[-1]
    report.add(
        Table(
            title=f"{sizes.saves} saves in a row, all modes in turn",
            columns=("", "after half of them", "after all"),
            rows=[
                ("resident memory, MiB", f"{rss / MIB:.1f}", f"{rss_end / MIB:.1f}"),
                ("open files", str(files), str(files_end)),
                ("threads", str(threads), str(threads_end)),
            ],
        )
    )
    grown = (rss_end - rss) / MIB
    report.judge(
        Row(
            number=9,
            what=f"growth of memory, open files and threads over {sizes.saves} saves",
            measured=f"{grown:+.1f} MiB, {files_end - files:+d}, {threads_end - threads:+d}",
            must="flat (8 MiB)",
            ok=grown <= 8 and files_end <= files and threads_end <= threads,
        )
    )


def transfer_rates(report: Report, folder: Path, sizes: Sizes, rounds: int) -> None:
    """Bytes per second from the device into captured memory, beside one plain transfer to pinned memory."""
    size = sizes.large_bytes
    make = jax.jit(lambda k: jnp.full((size // 4,), k, jnp.float32))
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")

    def link(turn: int) -> Mapping[str, float]:
        array = jax.block_until_ready(make(turn))
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(array, pinned))
        return {"blocked": time.perf_counter() - began, "durable": time.perf_counter() - began}

    def contender(mode: str, turn: int) -> Mapping[str, float]:
        tree = {"x": jax.block_until_ready(make(turn))}
        return measured(partial(ours, mode, emptied(folder / "rate"), tree), after=lambda: None, memory=0)

    runs: dict[str, Callable[[int], Mapping[str, float]]] = {"the link": link}
    runs |= {mode: partial(contender, mode) for mode in MODES}
    taken: Samples = interleave(runs, rounds=rounds)
    report.add(
        Table(
            title=f"Device to host, {size // MIB} MiB in one array",
            columns=("", "GiB/s while the caller is blocked", "of the link"),
            rows=[
                (
                    name,
                    f"{size / 2**30 / median(found['blocked']):.2f}",
                    f"{ratio(taken['the link']['blocked'], found['blocked']):.2f}",
                )
                for name, found in taken.items()
            ],
            note='"clone" and "split" return before their bytes are on the host.',
        )
    )


def whole_mesh() -> Mesh:
    return jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))


def standing() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(os.listdir("/proc/self/task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threads


if __name__ == "__main__":
    main()
