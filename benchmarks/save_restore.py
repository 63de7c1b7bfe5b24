"""Times of saving and restoring: many small leaves, one large state, replicated leaves, a mixture of experts.

Beside Orbax (v0 with its defaults, v0 uncompressed, v1) and a raw floor, all in the same interleaved rounds:
python benchmarks/save_restore.py [--quick]
"""

# ruff: noqa: E402, TC003 - the devices must be chosen before jax is imported; one block of imports
from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    stopwatch,
)
from _contenders import OURS, V0_PLAIN, Contender, abstract, contenders, host_views, raw_restore, raw_save
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc

RAW = "raw write+fsync, np.fromfile"


class Sizes(NamedTuple):
    rounds: int
    small: int  # leaves of 16 KiB
    more: int  # the same, once more with as many
    large_bytes: int
    replicated: int
    layers: int


FULL = Sizes(rounds=3, small=1000, more=4000, large_bytes=1024 * MIB, replicated=500, layers=8)
QUICK = Sizes(rounds=3, small=200, more=0, large_bytes=128 * MIB, replicated=100, layers=2)
TINY = Sizes(rounds=1, small=8, more=0, large_bytes=8 * MIB, replicated=4, layers=1)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=("small", "large", "large-restore", "replicated", "moe"))
    args = options.parse_args()
    sizes = TINY if args.tiny else QUICK if args.quick else FULL
    sizes = sizes._replace(rounds=args.rounds or sizes.rounds)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    report = Report("Save and restore")
    with scratch(args.root) as folder:
        if args.only in (None, "small"):
            small(report, folder, mesh, sizes)
        if args.only in (None, "large"):
            large_save(report, folder, mesh, sizes)
        if args.only in (None, "large", "large-restore"):
            large_restore(report, folder, mesh, sizes)
        if args.only in (None, "replicated"):
            replicated(report, folder, mesh, sizes)
        if args.only in (None, "moe"):
            moe(report, folder, mesh, sizes)
    finish(report, args)


def small(report: Report, folder: Path, mesh: Mesh, sizes: Sizes) -> None:
    tree = small_leaves(mesh, sizes.small)
    samples = time_all(folder, tree, rounds=sizes.rounds)
    report.add(overview(f"{sizes.small:,} leaves of 16 KiB on 8 devices", samples))
    rivals = [name for name in samples if name not in (OURS, RAW)]
    best = {
        what: min(ratio(samples[name][what], samples[OURS][what]) for name in rivals) for what in ("save", "restore")
    }
    report.judge(
        Row(
            number=1,
            what=f"{sizes.small:,} x 16 KiB leaves on 8 devices: save / restore, the fastest Orbax over ours",
            measured=f"{best['save']:.1f}x / {best['restore']:.1f}x",
            must=">= 10x / >= 10x",
            ok=min(best.values()) >= 10,
        )
    )
    if sizes.more:
        samples = time_all(folder, small_leaves(mesh, sizes.more), rounds=1, warm_up=0)
        report.add(overview(f"{sizes.more:,} leaves of 16 KiB on 8 devices (one round)", samples))


def replicated(report: Report, folder: Path, mesh: Mesh, sizes: Sizes) -> None:
    tree = {f"layer_{i:05}": put((64, 64), jnp.float32, mesh, P(), i) for i in range(sizes.replicated)}
    samples = time_all(folder, tree, rounds=sizes.rounds)
    report.add(overview(f"{sizes.replicated:,} leaves of 16 KiB, replicated on 8 devices", samples))


def moe(report: Report, folder: Path, mesh: Mesh, sizes: Sizes) -> None:
    tree = mixture_of_experts(mesh, sizes.layers)
    leaves = jax.tree.leaves(tree)
    samples = time_all(folder, tree, rounds=sizes.rounds)
    size = sum(leaf.nbytes for leaf in leaves) / MIB
    report.add(overview(f"A mixture of experts: {len(leaves)} leaves, {size:.0f} MiB, sharded and replicated", samples))


def large_save(report: Report, folder: Path, mesh: Mesh, sizes: Sizes) -> None:
    tree = large_state(mesh, sizes.large_bytes)
    samples = time_all(folder, tree, rounds=sizes.rounds, restore=False)
    leaves = len(jax.tree.leaves(tree))
    report.add(overview(f"{sizes.large_bytes // MIB} MiB in {leaves} leaves on 8 devices, durable save", samples))
    ours = ratio(samples[RAW]["save"], samples[OURS]["save"])
    plain = ratio(samples[V0_PLAIN]["save"], samples[OURS]["save"])
    report.judge(
        Row(
            number=2,
            what=f"{sizes.large_bytes // MIB} MiB in {leaves} leaves, save: raw / ours; uncompressed Orbax / ours",
            measured=f"{ours:.2f}; {plain:.2f}",
            must=">= 0.8; >= 1",
            ok=ours >= 0.8 and plain >= 1,
        )
    )


def large_restore(report: Report, folder: Path, mesh: Mesh, sizes: Sizes) -> None:
    """From page cache, all results kept until the end of the repetition, as a restore must."""
    tree = large_state(mesh, sizes.large_bytes)
    leaves = jax.tree.leaves(tree)
    found = contenders()
    for name, contender in found.items():
        contender.save(emptied(folder / name), tree)
    raw_save(folder / "raw", host_views(leaves))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    likes = {
        "8 devices": abstract(tree),
        "1 device": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree),
    }
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    keys, memory = list(tree), warm_bytes(leaves)
    del tree, leaves

    def timed(into: dict[str, float], what: str, work: Callable[[], Any]) -> None:
        """The better of two in a row: the first may still pay for memory that the host had taken back."""
        both = []
        for _ in range(2):
            with stopwatch(into, what, memory_bytes=memory):
                kept = work()
            del kept
            both.append(into[what])
        into[what] = min(both)

    def one_by_one() -> None:
        with (folder / "raw").open("rb", buffering=0) as file:
            for spec in specs:
                np.fromfile(file, spec.dtype, int(np.prod(spec.shape)))

    def only_by_only() -> None:
        for key in keys:
            jc.restore(folder / OURS, jc.on_host, only=key)

    def fromfile(turn: int) -> dict[str, float]:
        times: dict[str, float] = {}
        timed(times, "kept", lambda: raw_restore(folder / "raw", specs))
        timed(times, "dropped", one_by_one)
        return times

    def restored(name: str) -> Callable[[int], dict[str, float]]:
        def run(turn: int) -> dict[str, float]:
            times: dict[str, float] = {}
            for where, like in likes.items():
                timed(times, where, lambda like=like: found[name].restore(folder / name, like))
            if name == OURS:
                timed(times, "numpy", lambda: jc.restore(folder / name, jc.on_host))
                timed(times, "numpy, leaf by leaf, dropped", only_by_only)
            return times

        return run

    samples = interleave({"np.fromfile": fromfile, **{name: restored(name) for name in found}}, rounds=sizes.rounds)
    for name in found:
        emptied(folder / name)
    (folder / "raw").unlink()
    floor = samples["np.fromfile"]
    rows = []
    for name, taken in samples.items():
        for what, times in taken.items():
            against = floor["dropped" if "dropped" in what else "kept"]
            rows.append((name, what, seconds(times), f"{ratio(against, times):.2f}"))
    report.add(
        Table(
            title=f"{sizes.large_bytes // MIB} MiB in {len(specs)} leaves, restore from page cache",
            columns=("", "results", "s, median (range)", "np.fromfile / this"),
            rows=rows,
            note="Results are kept until all leaves are there, except where they are dropped leaf by leaf. "
            "Each figure is the better of two runs in a row.",
        )
    )
    ours = {what: ratio(floor["kept"], samples[OURS][what]) for what in ("8 devices", "1 device", "numpy")}
    plain = min(ratio(samples[V0_PLAIN][what], samples[OURS][what]) for what in likes)
    report.judge(
        Row(
            number=3,
            what="same, restore: np.fromfile / ours on 8 devices, 1 device, numpy; uncompressed Orbax / ours",
            measured=f"{', '.join(f'{value:.2f}' for value in ours.values())}; {plain:.2f}",
            must=">= 0.9; >= 1",
            ok=min(ours.values()) >= 0.9 and plain >= 1,
        )
    )


def time_all(folder: Path, tree: Any, *, rounds: int, warm_up: int = 1, restore: bool = True) -> Samples:
    """Save and restore by all contenders, and the floor."""
    like, leaves = abstract(tree), jax.tree.leaves(tree)
    views, memory = host_views(leaves), warm_bytes(leaves)

    def ours_or_theirs(name: str, contender: Contender) -> Callable[[int], dict[str, float]]:
        def run(turn: int) -> dict[str, float]:
            times: dict[str, float] = {}
            path = emptied(folder / name)
            with stopwatch(times, "save", memory_bytes=memory):
                contender.save(path, tree)
            if restore:
                with stopwatch(times, "restore", memory_bytes=memory):
                    kept = contender.restore(path, like)
                if turn < 1:
                    check(tree, kept)
                del kept
            emptied(path)
            return times

        return run

    def floor(turn: int) -> dict[str, float]:
        times: dict[str, float] = {}
        with stopwatch(times, "save", memory_bytes=memory):
            raw_save(folder / "raw", views)
        if restore:
            with stopwatch(times, "restore", memory_bytes=memory):
                kept = raw_restore(folder / "raw", leaves)
            del kept
        (folder / "raw").unlink()
        return times

    runs = {RAW: floor, **{name: ours_or_theirs(name, contender) for name, contender in contenders().items()}}
    return interleave(runs, rounds=rounds, warm_up=warm_up)


def warm_bytes(leaves: list[jax.Array]) -> int:
    """The memory that holds all leaves as they lie on the devices, and a quarter more."""
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards) * 5 // 4


def check(tree: Any, restored: Any) -> None:
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(restored), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise AssertionError("A restored leaf differs from the one that was saved.")


def overview(title: str, samples: Samples) -> Table:
    whats = list(next(iter(samples.values())))
    rows = []
    for name, taken in samples.items():
        row = [name]
        for what in whats:
            row += [seconds(taken[what]), f"{ratio(taken[what], samples[OURS][what]):.2f}x"]
        rows.append(row)
    columns = ["", *(column for what in whats for column in (f"{what} s, median (range)", "over jaxckpt's"))]
    return Table(title=title, columns=columns, rows=rows, note=f"{len(samples[OURS][whats[0]])} rounds.")


# The trees. Random normal values: like weights, they hardly compress.

_RANDOM = np.random.default_rng(0).standard_normal(8 * MIB // 4 * 4, dtype=np.float32)  # 32 MiB


def put(shape: tuple[int, ...], dtype: Any, mesh: Mesh, spec: P, seed: int) -> jax.Array:
    size = int(np.prod(shape))
    host = np.take(_RANDOM, np.arange(seed * 4099, seed * 4099 + size), mode="wrap").reshape(shape)
    return jax.block_until_ready(jax.device_put(jnp.asarray(host, dtype), NamedSharding(mesh, spec)))


def small_leaves(mesh: Mesh, count: int) -> dict[str, jax.Array]:
    return {f"layer_{i:05}": put((64, 64), jnp.float32, mesh, P("d", "m"), i) for i in range(count)}


def large_state(mesh: Mesh, size_bytes: int) -> dict[str, jax.Array]:
    """92 matrices: half the bytes in 16, most of the others in 36, the rest in 40 (32, 12 and 2 MiB of 1 GiB)."""
    unit = size_bytes // 512
    rows = [((unit // 4 // 256, 256 * 16), 16), ((unit // 4 // 256, 256 * 6), 36), ((unit // 4 // 256, 256), 40)]
    shapes = [shape for shape, count in rows for _ in range(count)]
    return {f"layer_{i:03}": put(shape, jnp.float32, mesh, P("d", "m"), i) for i, shape in enumerate(shapes)}


def mixture_of_experts(mesh: Mesh, layers: int) -> dict[str, Any]:
    def layer(i: int) -> dict[str, Any]:
        experts = {f"expert_{k:02}": expert(mesh, 100 * i + k) for k in range(8)}
        shared = {
            name: put((512, 512), jnp.bfloat16, mesh, P("d", "m"), 100 * i + 50 + k) for k, name in enumerate("qkvo")
        }
        norms = {f"norm_{k}": put((512,), jnp.float32, mesh, P(), 100 * i + 60 + k) for k in range(4)}
        router = put((512, 8), jnp.float32, mesh, P(), 100 * i + 70)
        moments = put((8, 512, 1024), jnp.float32, mesh, P("d", None, "m"), 100 * i + 80)
        return {"experts": experts, "attention": shared, "norms": norms, "router": router, "moments": moments}

    return {f"layer_{i}": layer(i) for i in range(layers)}


def expert(mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    return {
        "up": put((512, 256), jnp.bfloat16, mesh, P("d", "m"), seed),
        "down": put((256, 512), jnp.bfloat16, mesh, P("m", "d"), seed + 10),
        "bias": put((512,), jnp.float32, mesh, P("m"), seed + 20),
        "count": put((), jnp.int32, mesh, P(), seed),
    }


if __name__ == "__main__":
    main()
