"""Averages: `combine` in memory against a plain memory copy; checkpoints on storage against restoring them; accuracy.

    python benchmarks/averaging.py [--quick]

The naive loop is one `jax.tree.map` per model, as one would write it; torch's `swa_utils.AveragedModel` joins where
torch is installed.
"""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from _common import MIB, Report, Row, Table, finish, interleave, parser, ratio, scratch, seconds, stopwatch
from memory import reset_peak, status_bytes, trim

K = 20
LEAVES = 16


class Sizes(NamedTuple):
    rounds: int
    in_memory: int  # bytes of one model, float32
    counts: tuple[int, ...]  # models in memory
    stored: int  # bytes of one checkpoint
    many: int  # bytes of one checkpoint where P = 16 models are made


FULL = Sizes(rounds=3, in_memory=32 * MIB, counts=(5, 20, 40), stored=256 * MIB, many=64 * MIB)
QUICK = Sizes(rounds=2, in_memory=8 * MIB, counts=(5, 20), stored=32 * MIB, many=16 * MIB)
TINY = Sizes(rounds=1, in_memory=MIB, counts=(20,), stored=MIB, many=MIB)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--child", nargs=2, metavar=("FOLDER", "BYTES"), help=argparse.SUPPRESS)
    args = options.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.child:
        print(json.dumps(peak(Path(args.child[0]), int(args.child[1]))))
        return
    sizes = TINY if args.tiny else QUICK if args.quick else FULL
    sizes = sizes._replace(rounds=args.rounds or sizes.rounds)
    report = Report("Averages")
    with scratch(args.root) as folder:
        on_storage(report, sizes, folder)
    in_memory(report, sizes)
    accuracy(report)
    finish(report, args)


def in_memory(report: Report, sizes: Sizes) -> None:
    rows = []
    for count in sizes.counts:
        makers = contenders(count, sizes.in_memory // 4)
        runs = {name: timed(run) for name, (run, _) in makers.items()}
        taken = interleave(runs, rounds=max(sizes.rounds, 5))
        speed = {name: [moved / s for s in taken[name]["seconds"]] for name, (_, moved) in makers.items()}
        copy = speed["memory copy"]
        for name in makers:
            share = ratio(speed[name], copy)
            rows.append(
                (f"{count}", name, f"{median(speed[name]) / 1e9:.1f}", f"{share:.2f}", seconds(taken[name]["seconds"]))
            )
        if count == K:
            share = ratio(speed["combine"], copy)
            over = ratio(taken["naive tree.map"]["seconds"], taken["combine"]["seconds"])
            report.judge(
                Row(
                    number=3,
                    what="averaging: combine of 20 in memory, bytes/s over a memory copy's; speed over naive tree.map",
                    measured=f"{share:.2f}; {over:.1f}x",
                    must=">= 0.7; >= 2x",
                    ok=share >= 0.7 and over >= 2,
                )
            )
    report.add(
        Table(
            title=f"K float32 models of {sizes.in_memory / MIB:.0f} MiB in memory, one weighted sum",
            columns=("K", "", "GB/s", "of a memory copy's", "s, median (range)"),
            rows=rows,
            note="GB/s: the K models read and the result written, per second; for the copy, both its sides. Whatever a "
            "contender reads or writes besides does not count.",
        )
    )


def contenders(count: int, elements: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (one sum, the bytes that it has to move)."""
    import jax
    import jax.numpy as jnp

    from jaxckpt.averaging import combine

    rng = np.random.default_rng(0)
    shape = (LEAVES, elements // LEAVES)
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(count)]
    weights = rng.standard_normal(count)
    models = [{f"{i}": jnp.asarray(array[i]) for i in range(LEAVES)} for array in arrays]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    scalars = [jnp.float32(w) for w in weights]
    source, target = np.ones(2 * elements, np.float32), np.zeros(2 * elements, np.float32)

    def naive() -> object:
        total = jax.tree.map(lambda x: scalars[0] * x, models[0])
        for weight, model in zip(scalars[1:], models[1:], strict=True):
            total = jax.tree.map(lambda t, x, weight=weight: t + weight * x, total, model)
        return jax.block_until_ready(total)

    def plain_numpy() -> object:
        total = np.float32(weights[0]) * arrays[0]
        for weight, array in zip(weights[1:], arrays[1:], strict=True):
            total += np.float32(weight) * array
        return total

    moved = (count + 1) * elements * 4
    jitted = jax.jit(lambda s: combine(s, weights))
    found: dict[str, tuple[Callable[[], object], int]] = {
        "memory copy": (lambda: np.copyto(target, source), 2 * source.nbytes),
        "combine": (lambda: jax.block_until_ready(combine(stacked, weights)), moved),
        "combine, inside jit": (lambda: jax.block_until_ready(jitted(stacked)), moved),
        "naive tree.map": (naive, moved),
        "numpy loop": (plain_numpy, moved),
    }
    return found | torch_swa(arrays, moved)


def torch_swa(arrays: list[np.ndarray], moved: int) -> dict[str, tuple[Callable[[], object], int]]:
    """torch's own averaging of models that are in memory: equal weights, the only ones that it has."""
    try:
        import torch
        from torch.optim.swa_utils import AveragedModel
    except ImportError:
        return {}

    class Model(torch.nn.Module):
        def __init__(self, array: np.ndarray) -> None:
            super().__init__()
            self.leaves = torch.nn.ParameterList(
                [torch.nn.Parameter(torch.from_numpy(x), requires_grad=False) for x in array]
            )

    models = [Model(array) for array in arrays]

    def run() -> object:
        averaged = AveragedModel(models[0])
        for model in models:
            averaged.update_parameters(model)
        return averaged

    return {"torch swa_utils": (run, moved)}


def timed(run: Callable[[], object]) -> Callable[[int], Mapping[str, float]]:
    def measured(turn: int) -> Mapping[str, float]:
        started = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - started}

    return measured


def on_storage(report: Report, sizes: Sizes, folder: Path) -> None:
    import jax

    import jaxckpt as jc
    from jaxckpt.averaging import average
    from jaxckpt.core.events import Restored, subscribe

    large, like = stored(folder / "large", sizes.stored)
    weights = np.random.default_rng(1).standard_normal((16, K))

    def averaged(turn: int) -> Mapping[str, float]:
        taken: dict[str, float] = {}
        with stopwatch(taken, "seconds", memory_bytes=sizes.stored):
            jax.block_until_ready(average(large, weights[0], like=like))
        return taken

    def restored(turn: int) -> Mapping[str, float]:
        taken: dict[str, float] = {}
        with stopwatch(taken, "seconds", memory_bytes=sizes.stored):
            for path in large:
                jax.block_until_ready(jc.restore(path, like))
        return taken

    runs = interleave({"average": averaged, "restore all": restored}, rounds=sizes.rounds)
    events: list[Any] = []
    stop = subscribe(events.append)
    average(large, weights[0], like=like)
    stop()
    read = sum(event.read_bytes for event in events if isinstance(event, Restored))
    on_disk = sum(f.stat().st_size for path in large for f in Path(path).rglob("*") if f.is_file())
    child = [sys.executable, __file__, "--child", str(folder / "large"), str(sizes.stored)]
    told = subprocess.run(child, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RuntimeError(told.stderr)
    above = json.loads(told.stdout.splitlines()[-1])["peak_bytes"] - sizes.stored
    times = ratio(runs["average"]["seconds"], runs["restore all"]["seconds"])
    report.add(
        Table(
            title=f"{K} checkpoints of {sizes.stored / MIB:.0f} MiB on local disk, warm page cache",
            columns=("", "s, median (range)"),
            rows=[(name, seconds(found["seconds"])) for name, found in runs.items()],
        )
    )
    for path in large:
        subprocess.run(["rm", "-r", path], check=True)
    report.judge(
        Row(
            number=1,
            what="averaging: 20 checkpoints, bytes read / stored; peak memory above one model",
            measured=f"{read / on_disk:.3f}; {above / MIB:.0f} MiB",
            must="<= 1.02; <= 64 MiB and a bucket",
            ok=read <= 1.02 * on_disk and above <= 64 * MIB,
        )
    )
    report.judge(
        Row(
            number=2,
            what="averaging: the same, time over restoring the 20 one after another",
            measured=f"{times:.2f}",
            must="<= 1.0",
            ok=times <= 1,
        )
    )
    many(report, sizes, folder, weights)


def many(report: Report, sizes: Sizes, folder: Path, weights: np.ndarray) -> None:
    import jax

    from jaxckpt.averaging import average

    paths, like = stored(folder / "many", sizes.many)

    def together(turn: int) -> Mapping[str, float]:
        taken: dict[str, float] = {}
        with stopwatch(taken, "seconds", memory_bytes=16 * sizes.many):
            jax.block_until_ready(average(paths, weights, like=like))
        return taken

    def separate(turn: int) -> Mapping[str, float]:
        taken: dict[str, float] = {}
        with stopwatch(taken, "seconds", memory_bytes=16 * sizes.many):
            kept = [jax.block_until_ready(average(paths, row, like=like)) for row in weights]
        assert len(kept) == 16
        return taken

    runs = interleave({"one pass": together, "16 averages": separate}, rounds=sizes.rounds)
    share = ratio(runs["one pass"]["seconds"], runs["16 averages"]["seconds"])
    report.add(
        Table(
            title=f"16 models from {K} checkpoints of {sizes.many / MIB:.0f} MiB",
            columns=("", "s, median (range)"),
            rows=[(name, seconds(found["seconds"])) for name, found in runs.items()],
        )
    )
    report.judge(
        Row(
            number=5,
            what="averaging: 16 models from one pass over storage, time over 16 averages",
            measured=f"{share:.2f}",
            must="<= 0.25",
            ok=share <= 0.25,
        )
    )


def stored(folder: Path, size: int) -> tuple[list[str], dict[str, Any]]:
    """Paths of K checkpoints, and what to restore them into."""
    import jax

    import jaxckpt as jc

    shape = (max(size // 4 // LEAVES // 1024, 1), 1024)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {f"layer{i}.w": jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for i in range(LEAVES)}
    rng = np.random.default_rng(0)
    paths = [str(folder / f"{k}") for k in range(K)]
    for path in paths:
        if not Path(path).exists():
            jc.save(path, {name: jax.device_put(rng.standard_normal(shape, np.float32)) for name in like})
    return paths, like


def peak(folder: Path, size: int) -> dict[str, int]:
    """The peak of resident memory while averaging, above what there was before."""
    import jax

    from jaxckpt.averaging import average

    paths, like = stored(folder, size)
    small = {name: like[name] for name in list(like)[:1]}
    jax.block_until_ready(average(paths[:2], like=small, only=list(small)))  # compiled, and the arena is warm
    gc.collect()
    trim()
    before = reset_peak()
    kept = jax.block_until_ready(average(paths, like=like))
    assert len(kept) == len(like)
    return {"peak_bytes": status_bytes("VmHWM") - before}


def accuracy(report: Report) -> None:
    """The worst distance from a float64 sum, in units of the last place of its rounded value."""
    import jax.numpy as jnp
    import ml_dtypes

    from jaxckpt.averaging import combine

    rng = np.random.default_rng(0)
    rows, worst = [], 0
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        for count in (20, 40):
            stack = rng.standard_normal((count, 1 << 18), np.float32).astype(dtype)
            for kind, weights in (
                ("uniform", np.full(count, 1 / count)),
                ("signed", rng.standard_normal(count)),
                ("signed, sum 1, |w| up to 6", 6 * np.sin(np.arange(count) * 2.4) + 1 / count),
            ):
                terms = weights[:, None] * stack.astype(np.float64)
                oracle = np.add.reduce(terms, axis=0)
                # Terms that cancel altogether, as few bits do, leave the rounding of the oracle and no sum.
                sound = np.abs(oracle) > 1e-12 * np.abs(terms).sum(axis=0)
                plain = jnp.einsum("k,kn->n", jnp.asarray(weights, jnp.float32), jnp.asarray(stack).astype(jnp.float32))
                ours = [
                    ulps(np.asarray(combine(stack, weights, accumulate=a)), oracle, sound)
                    for a in ("float64", "float32")
                ]
                worst = max(worst, *ours)
                rows.append(
                    (
                        name,
                        f"{count}",
                        kind,
                        *(f"{u}" for u in ours),
                        f"{ulps(np.asarray(plain).astype(dtype), oracle, sound)}",
                    )
                )
    report.add(
        Table(
            title="Units in the last place between the sum and the rounded float64 oracle, worst of 262,144 elements",
            columns=("dtype", "K", "weights", "float64", "float32 pairs", "plain float32"),
            rows=rows,
        )
    )
    report.judge(
        Row(
            number=4,
            what="averaging: distance from the rounded float64 oracle (tests cover meshes and processes)",
            measured=f"{worst} ulp",
            must="<= 1 ulp",
            ok=worst <= 1,
        )
    )


def ulps(found: np.ndarray, oracle: np.ndarray, sound: np.ndarray) -> int:
    found, oracle = found[sound], oracle[sound]
    rounded = oracle.astype(np.float32).astype(found.dtype)
    kind = {2: np.int16, 4: np.int32}[found.dtype.itemsize]
    ordered = []
    for part in (found, rounded):
        bits = part.view(kind).astype(np.int64)
        ordered.append(np.where(bits < 0, np.iinfo(kind).min - bits, bits))
    return int(np.abs(ordered[0] - ordered[1]).max())


if __name__ == "__main__":
    main()
