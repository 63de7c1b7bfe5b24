"""Fork test: train once, then lose each stage in every way; the rise of the loss right after, and 50 steps later.

    python benchmarks/recovery_fork.py [--quick] [--cache FOLDER]

With and without CheckFree+'s swapped half, on real text. Minutes; --cache keeps each arm, to go on after a break.
"""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # models stand beside the benchmarks

from _common import Report, Row, Table, finish, parser
from _stages import Run, Study

from jaxckpt.recovery.plan import RecoveryPolicy
from models.llama import LlamaConfig

HEADS = ("query", "key", "value")
SPLICE = tuple((f"attention.{name}", -2) for name in HEADS) + (
    ("attention.out", -3), ("mlp.gate", -1), ("mlp.up", -1), ("mlp.down", -2),
)  # fmt: skip
NEIGHBOURS: dict[str, RecoveryPolicy] = {
    "random": RecoveryPolicy(method="random"),
    "copy": RecoveryPolicy(method="copy"),
    "uniform average": RecoveryPolicy(method="uniform"),
    "weighted, power 1": RecoveryPolicy(),
    "weighted, power 2": RecoveryPolicy(power=2),
    "identity": RecoveryPolicy(method="identity", zero=("attention.out", "mlp.down")),
    "splice": RecoveryPolicy(method="splice", units=SPLICE),
}
RULES = ("uniform average", "weighted, power 1", "weighted, power 2")  # averages; edges: the copy that replaces them
PARTNER, KEPT = "swap partner", "own copy, 10 old, moments kept"


class Sizes(NamedTuple):
    model: LlamaConfig
    stages: int
    batch: int
    length: int
    steps: tuple[int, ...]  # forks of the copies' ages; the last one is the fork
    ages: tuple[int, ...]
    later: int
    lost: tuple[int, ...] = (0, 1, 2, 3, 4, 5)


def small(layers: int, embed: int) -> LlamaConfig:
    return LlamaConfig(
        embed=embed, mlp=4 * embed, layers=layers, heads=4, kv_heads=4, tied=False, norm_epsilon=1e-6
    )  # fmt: skip


FULL = Sizes(small(6, 64), 6, 16, 64, (100, 300, 600), (1, 10, 50), 50)
QUICK = Sizes(small(6, 32), 6, 16, 32, (50, 200), (1, 10, 50), 20)
TINY = Sizes(small(4, 16), 4, 4, 16, (12,), (1, 10), 2, (0, 1))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cache", type=Path, help="folder for finished arms")
    args = options.parse_args()
    sizes = TINY if args.tiny else QUICK if args.quick else FULL
    report = Report("Fork test: one stage lost")
    arms = {name: cached(args.cache, name, sizes, swap) for name, swap in (("plain", False), ("swap", True))}
    for name, arm in arms.items():
        show(report, name, arm, sizes)
    judge(report, arms, sizes)
    finish(report, args)


def cached(folder: Path | None, name: str, sizes: Sizes, swap: bool) -> dict[str, Any]:
    key = json.loads(json.dumps([asdict(sizes.model) | {"param_dtype": "", "compute_dtype": ""}, *sizes[1:]]))
    path = None if folder is None else folder / f"fork_{name}.json"
    if path is not None and path.exists() and (found := json.loads(path.read_text()))["sizes"] == key:
        return found
    arm = arm_of(sizes, swap) | {"sizes": key}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(arm))
    return arm


def arm_of(sizes: Sizes, swap: bool) -> dict[str, Any]:
    study = Study(sizes.model, sizes.stages, sizes.batch, sizes.length, rate=2e-3, swap=swap)
    run, at, began = study.begin(), 0, time.perf_counter()
    by_age: dict[str, Any] = {}
    old: dict[int, Any] = {}
    for end in sizes.steps:
        old = {}
        for age in sorted(sizes.ages, reverse=True):
            run = study.train(run, range(at, end - age))
            at, old[age] = end - age, run.state
        run, at = study.train(run, range(at, end)), end
        before = study.loss(run)
        by_age[str(end)] = {"loss": before} | {
            str(age): [study.loss(stale(study, run, f, old, age)) - before for f in sizes.lost] for age in sizes.ages
        }
        print(f"swap={swap} step {end} loss {before:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
    rises, later = after(study, run, old, sizes)
    return {"loss": study.loss(run), "by_age": by_age, "rise": rises, "later": later}


def after(study: Study, run: Run, old: dict[int, Any], sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rises by method and stage; and losses after more steps, for some of them."""
    last, end, before = sizes.stages - 1, sizes.steps[-1], study.loss(run)
    rises: dict[str, list[float | None]] = {}
    later: dict[str, dict[str, float]] = {}
    plain = study.train(run, range(end, end + sizes.later))
    later["nothing lost"] = {"": study.loss(plain)}
    for name in [*NEIGHBOURS, PARTNER, *[f"own copy, {age} old" for age in sizes.ages], KEPT]:
        rises[name] = []
        for f in sizes.lost:
            found = way(study, run, f, name, old)
            rises[name].append(None if found is None else study.loss(found) - before)
            best = PARTNER if study.swap and f in (0, 1, last - 1, last) else RULES[1] if 0 < f < last else "copy"
            if f in (0, sizes.stages // 2 - 1, last) and name in ("random", best, f"own copy, {10} old"):
                assert found is not None
                kind = "CheckFree" if name == best else name
                again = study.train(found, range(end, end + sizes.later))
                later.setdefault(kind, {})[str(f)] = study.loss(again)
        print(f"{name}: {rises[name]}", flush=True)
    return rises, later


def way(study: Study, run: Run, f: int, name: str, old: dict[int, Any]) -> Run | None:
    """One stage lost and brought back; None where the method has nothing to say."""
    edge = f in (0, study.stages - 1)
    if name == PARTNER:
        partnered = study.swap and f in (0, 1, study.stages - 2, study.stages - 1)
        return study.recover(run, f, source="edge_copy", policy=RecoveryPolicy()) if partnered else None
    if name == KEPT:
        return study.recover(run, f, source="stale_copy", policy=RecoveryPolicy(optimizer="keep"), old=old[10], age=10)
    if name.startswith("own copy"):
        return stale(study, run, f, old, int(name.split()[2]))
    if edge and name not in ("random", "copy"):
        return None
    return study.recover(run, f, source="average", policy=NEIGHBOURS[name])


def stale(study: Study, run: Run, f: int, old: dict[int, Any], age: int) -> Run:
    weights = {"params": old[age]["params"]}
    return study.recover(run, f, source="stale_copy", policy=RecoveryPolicy(), old=weights, age=age)


def show(report: Report, name: str, arm: dict[str, Any], sizes: Sizes) -> None:
    kind = "half of the batch with swapped stages" if name == "swap" else "no swapping"
    report.add(
        Table(
            title=f"Rise of the held-out loss right after, {kind} (loss before: {arm['loss']:.3f} nats per byte)",
            columns=("stage lost", *map(str, sizes.lost)),
            rows=[(way_, *("-" if x is None else f"{x:+.3f}" for x in found)) for way_, found in arm["rise"].items()],
        )
    )
    stages = sorted(arm["later"]["random"], key=int)
    report.add(
        Table(
            title=f"Loss {sizes.later} steps later, {kind}",
            columns=("stage lost", *stages),
            rows=[
                (way_, *(f"{found.get(f, found.get('', 0.0)):.3f}" for f in stages))
                for way_, found in arm["later"].items()
            ],
            note="CheckFree: weighted average (power 1) in the middle; at the edges the swap partner, or without "
            "swapping the only neighbour.",
        )
    )
    report.add(
        Table(
            title=f"Worst rise over all stages from an own copy, by its age and the step of the loss, {kind}",
            columns=("step", "loss", *(f"{age} old" for age in sizes.ages)),
            rows=[
                (step, f"{found['loss']:.3f}", *(f"{max(found[str(age)]):+.4f}" for age in sizes.ages))
                for step, found in arm["by_age"].items()
            ],
        )
    )


def judge(report: Report, arms: dict[str, Any], sizes: Sizes) -> None:
    with_swap, without = arms["swap"]["rise"][PARTNER][0], arms["plain"]["rise"]["copy"][0]
    report.judge(
        Row(
            number=5,
            what="recovery: first stage lost, rise of the loss with swapping over without",
            measured=f"{with_swap:.3f} / {without:.3f} = {with_swap / without:.3f}",
            must="<= 0.2",
            ok=with_swap <= 0.2 * without,
        )
    )
    copies = [(x, f) for arm in arms.values() for f, x in enumerate(arm["rise"]["own copy, 10 old"])]
    below, margins = True, []
    for arm in arms.values():
        for f in range(len(sizes.lost)):
            others = [arm["rise"][rule][f] for rule in (*RULES, "copy", PARTNER)]
            best = min(x for x in others if x is not None)
            mine = arm["rise"]["own copy, 10 old"][f]
            below &= mine < best
            margins.append(best - mine)
    report.judge(
        Row(
            number=6,
            what="recovery: copy 10 steps old, worst rise over stages and arms; below every average and copy of a "
            "neighbour",
            measured=f"{max(copies)[0]:+.4f} (stage {max(copies)[1]}); {'yes' if below else 'no'}, by "
            f"{min(margins):.3f} to {max(margins):.3f}, median {median(margins):.3f}",
            must="<= 0.05; yes",
            ok=max(copies)[0] <= 0.05 and below,
        )
    )


if __name__ == "__main__":
    main()
