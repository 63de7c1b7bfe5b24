"""LCSC on real images: searched coefficients beside every other average, strategies at equal evaluations, and the
paper's two uses: less training for the same quality, and fewer evaluations of the network for an image.

    python benchmarks/lcsc_study.py --cache FOLDER [--quick] [--tasks ...] [--seeds ...] [--parts ...]

About 25 minutes on two cores. Everything found is kept in the cache, piece by piece: a study that was stopped goes on.
"""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _common import Report, Row, Table, finish, parser, scratch

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from _lcsc_tasks import GRID, ONLINE, Measures, Run, Task, baselines, measures, score  # noqa: E402

from jaxckpt import averaging, lcsc  # noqa: E402

TASKS = (
    Task(name="consistency, digits", kind="consistency", images="digits", width=96),
    Task(name="consistency, MNIST", kind="consistency", images="mnist", width=128),
    Task(name="diffusion, digits", kind="diffusion", images="digits", width=192, nfe=9, more=15, samples=256),
    Task(name="diffusion, MNIST", kind="diffusion", images="mnist", width=256, nfe=9, more=15, samples=256),
    Task(
        name="diffusion by DPM-Solver++, digits",
        kind="diffusion",
        images="digits",
        width=192,
        nfe=9,
        more=15,
        solver="dpm++",
        samples=256,
    ),
)
PARTS = ("strategies", "fewer", "cost")
BASELINES = ("last", "best single", "uniform", "EMA grid", "EMA online", "greedy soup")
FEW: dict[str, dict[str, Any]] = {
    "LCSC, defaults": {},
    "evolution": {"strategy": "evolution"},
    "evolution, fixed noise": {"strategy": "evolution", "noise": "fixed"},
    "random": {"strategy": "random"},
    "random, fixed noise": {"strategy": "random", "noise": "fixed"},
    "fixed noise": {"noise": "fixed"},
}
ALL = FEW | {
    "no penalty": {"l1_penalty": 0.0},
    "sep_cma_es": {"strategy": "sep_cma_es"},
    "cr_fm_nes": {"strategy": "cr_fm_nes"},
    "snes": {"strategy": "snes"},
    "xnes": {"strategy": "xnes"},
    "open_es": {"strategy": "open_es"},
    "pso, fixed noise": {"strategy": "pso", "noise": "fixed"},
    "differentialevolution, fixed noise": {"strategy": "differentialevolution", "noise": "fixed"},
    "gradient": {"strategy": "gradient"},
}


RIVALS = ("evolution", "evolution, fixed noise", "random", "random, fixed noise")


class Size(NamedTuple):
    seeds: tuple[int, ...]
    budget: int
    longest: int  # times the training of the searched run that plain training is followed for
    strategies: Mapping[str, Mapping[str, Any]]


FULL = Size(seeds=(0, 1, 2), budget=1024, longest=4, strategies=ALL)
QUICK = Size(seeds=(0, 1), budget=519, longest=2, strategies=FEW)
TINY = Size(seeds=(0,), budget=39, longest=2, strategies={name: FEW[name] for name in ("LCSC, defaults", "evolution")})


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cache", type=Path, help="folder of what was found so far; a temporary one by default")
    options.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS])
    options.add_argument("--seeds", nargs="+", type=int)
    options.add_argument("--strategies", nargs="+", choices=list(ALL), help="these alone; tables need all")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = options.parse_args()
    size = TINY if args.tiny else QUICK if args.quick else FULL
    if args.strategies:
        size = size._replace(strategies={name: ALL[name] for name in args.strategies})
    tasks = [_reduced(TASKS[0])] if args.tiny else [task for task in TASKS if task.name in args.tasks]
    seeds = args.seeds or list(size.seeds)[: args.rounds]
    warnings.simplefilter("ignore", RuntimeWarning)  # the guard's warnings; the tables say as much
    with scratch(args.root) as folder:
        cache = args.cache or folder
        cache.mkdir(parents=True, exist_ok=True)
        found = {task: {seed: Piece(cache, task, seed).run(size, args.parts) for seed in seeds} for task in tasks}
    report = Report("LCSC")
    for task, results in found.items():
        if "strategies" in args.parts:
            compare(report, task, results, size)
        if "cost" in args.parts:
            cost(report, task, results)
        if "fewer" in args.parts:
            fewer(report, task, results)
    if "strategies" in args.parts:
        judge(report, found)
    finish(report, args)


class Piece:
    """One task and seed. ``found``: results by name, kept in a file."""

    def __init__(self, cache: Path, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.path = cache / f"{task.name.replace(', ', '-')}-{seed}.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self._key = jax.random.key(10_000 + seed)  # of all final scores: common to all methods
        self._trained: tuple[Measures, Run, list[Any]] | None = None

    def run(self, size: Size, parts: tuple[str, ...]) -> dict[str, Any]:
        self.once("baselines", self._baselines)
        for name, how in size.strategies.items() if "strategies" in parts else [("LCSC, defaults", {})]:
            if name in FEW or self.task.name == "consistency, digits":
                self.once(name, lambda how=how: self._searched(how, size.budget))
        if "fewer" in parts:
            self.once("fewer", self._fewer)
        if "cost" in parts and self.task.kind == "consistency":
            self.once("cost", lambda: self._cost(size.longest))
        return self.found

    def once(self, name: str, make: Callable[[], Any]) -> None:
        if name in self.found:
            return
        started = time.perf_counter()
        self.found[name] = make()
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.found))
        beside.replace(self.path)
        print(f"{self.task.name}, seed {self.seed}: {name} in {time.perf_counter() - started:.1f} s", flush=True)

    @property
    def trained(self) -> tuple[Measures, Run, list[Any]]:
        if self._trained is None:
            run = Run(self.task, self.seed)
            checkpoints = run.checkpoints()
            self._trained = measures(self.task, self.seed), run, checkpoints
        return self._trained

    def _baselines(self) -> dict[str, Any]:
        by, run, checkpoints = self.trained
        stacked = averaging.stack(checkpoints)
        named = baselines(checkpoints, by.chooses, jax.random.fold_in(self._key, 1))
        trees = {name: averaging.combine(stacked, a) for name, a in named.items()}
        trees["EMA online"] = self._best(by, run.online())
        found = {name: self._scores(tree) for name, tree in trees.items()}
        for name, a in named.items():
            found[name]["l1"] = float(np.abs(a).sum())
        return {"scores": found, "floor": by.floor, "accuracy": by.accuracy}

    def _searched(self, how: Mapping[str, Any], budget: int) -> dict[str, Any]:
        by, _, checkpoints = self.trained
        started = time.perf_counter()
        found = lcsc.search(
            checkpoints,
            by.objective,
            like=checkpoints[0],
            budget=budget,
            key=self.seed,
            validation=by.chooses,
            **how,
        )
        took = time.perf_counter() - started
        scores = self._scores(found.params)
        return scores | {
            "l1": float(np.abs(found.coefficients).sum()),
            "chosen": found.report.chosen,
            "evaluations": found.report.evaluations,
            "seconds": took,
            "coefficients": found.coefficients.tolist(),
        }

    def _fewer(self) -> dict[str, Any]:
        """The models without LCSC, with more evaluations for an image: the second noise level that is best for each."""
        by, run, checkpoints = self.trained
        stacked = averaging.stack(checkpoints)
        grid = [averaging.combine(stacked, averaging.ema_weights(len(checkpoints), decay)) for decay in GRID]
        named = {
            "last": checkpoints[-1],
            "EMA grid": self._best(by, grid),
            "EMA online": self._best(by, run.online()),
        }
        found: dict[str, Any] = {}
        for name, tree in named.items():
            key = jax.random.fold_in(self._key, 1)
            level = min(by.slower, key=lambda one: float(score(by.slower[one][0], [tree], key)[0]))
            _, held_out, guard = by.slower[level]
            key = jax.random.fold_in(self._key, 2)
            found[name] = {
                "level": level,
                "fd": float(score(held_out, [tree], key)[0]),
                "guard": float(score(guard, [tree], key)[0]),
            }
        return found

    def _cost(self, longest: int) -> dict[str, Any]:
        """Plain training goes on: the held-out distance of the last weights and of the best online EMA, by steps."""
        by, run, _ = self.trained
        steps, last, ema, seconds = [self.task.end], [], [], 0.0
        while True:
            last.append(self._scores(run.state.train.params)["fd"])
            ema.append(self._scores(self._best(by, run.online()))["fd"])
            if steps[-1] >= longest * self.task.end:
                return {"steps": steps, "last": last, "ema": ema, "seconds_per_step": seconds / (steps[-1] - steps[0])}
            more = self.task.end // 4 if steps[-1] < 2 * self.task.end else self.task.end // 2
            started = time.perf_counter()
            run.advance(more)
            jax.block_until_ready(run.state)
            seconds += time.perf_counter() - started
            steps.append(steps[-1] + more)

    def _best(self, by: Measures, trees: list[Any]) -> Any:
        return trees[int(np.argmin(score(by.chooses, trees, jax.random.fold_in(self._key, 1))))]

    def _scores(self, tree: Any) -> dict[str, float]:
        by, key = self.trained[0], jax.random.fold_in(self._key, 2)
        return {"fd": float(score(by.held_out, [tree], key)[0]), "guard": float(score(by.guard, [tree], key)[0])}


Results = dict[int, dict[str, Any]]


def compare(report: Report, task: Task, results: Results, size: Size) -> None:
    rows = []
    for name in (*BASELINES, *size.strategies):
        if all(_has(one, name) for one in results.values()):
            fd, guard, l1 = (np.array([_get(one, name).get(what, 1.0) for one in results.values()])
                             for what in ("fd", "guard", "l1"))  # fmt: skip
            rows.append((name, f"{fd.mean():.2f}", _change(results, name, "fd"), f"{guard.mean():.4f}",
                         _change(results, name, "guard"), f"{l1.mean():.2f}"))  # fmt: skip
    floors = [one["baselines"]["floor"] for one in results.values()]
    accuracy = np.mean([one["baselines"]["accuracy"] for one in results.values()])
    report.add(
        Table(
            title=f"{task.name}: {task.count} checkpoints up to step {task.end}, {task.nfe} NFE, {len(results)} seeds",
            columns=(
                "",
                "FD",
                "against the EMA grid",
                "energy (guard)",
                "against the EMA grid",
                "sum of magnitudes",
            ),
            rows=rows,
            note=f"Held-out images, {task.many} samples; mean over seeds [lowest, highest]. FD by a classifier's 32 "
            f"features (accuracy {accuracy:.1%}). Of the validation images themselves: FD "
            f"{np.mean([f[0] for f in floors]):.2f}, energy {np.mean([f[1] for f in floors]):.4f}.",
        )  # fmt: skip
    )


def cost(report: Report, task: Task, results: Results) -> None:
    rows = []
    for seed, one in results.items():
        if "cost" not in one:
            continue
        found, wanted = one["cost"], one["LCSC, defaults"]["fd"]
        search = one["LCSC, defaults"]["seconds"] / found["seconds_per_step"]
        cells = [f"{wanted:.2f}", f"{search:,.0f}"]
        for name in ("last", "ema"):
            reached = [step for step, fd in zip(found["steps"], found[name], strict=True) if fd <= wanted]
            text = f"{reached[0]:,} ({reached[0] / task.end:.1f}x)" if reached else f"> {found['steps'][-1]:,}"
            cells += [text, f"{min(found[name]):.2f}"]
        rows.append((str(seed), *cells))
    if rows:
        report.add(
            Table(
                title=f"{task.name}: plain training until it is as good as LCSC of {task.end:,} steps",
                columns=(
                    "seed",
                    "FD of LCSC",
                    "search, in steps",
                    "last",
                    "its lowest FD",
                    "EMA online",
                    "its lowest FD",
                ),
                rows=rows,
                note="The steps after which the last weights and the online EMA are first as good on held-out images. "
                f"The EMA is at each point that of {len(ONLINE)} decays which is best on validation images.",
            )  # fmt: skip
        )


def fewer(report: Report, task: Task, results: Results) -> None:
    cases = [("LCSC", task.nfe, [one["LCSC, defaults"] for one in results.values()])]
    for name in ("last", "EMA grid", "EMA online"):
        cases.append((name, task.nfe, [one["baselines"]["scores"][name] for one in results.values()]))
        cases.append((name, task.more, [one["fewer"][name] for one in results.values()]))
    rows = [
        (name, str(nfe), _spread([one["fd"] for one in found]), _spread([one["guard"] for one in found], 4))
        for name, nfe, found in cases
    ]
    title = f"{task.name}: {task.nfe} NFE with LCSC, {task.more} without"
    report.add(Table(title=title, columns=("", "NFE", "FD", "energy (guard)"), rows=rows))


def judge(report: Report, found: dict[Task, Results]) -> None:
    for task, results in found.items():
        ours = np.mean([one["LCSC, defaults"]["fd"] for one in results.values()])
        others = {name: np.mean([_get(one, name)["fd"] for one in results.values()]) for name in BASELINES}
        gain, guard = (_changes(results, "LCSC, defaults", what).mean() for what in ("fd", "guard"))
        report.judge(
            Row(
                number=6,
                what=f"LCSC, {task.name}: FD, next best average; against the best EMA: FD, guard",
                measured=f"{ours:.2f}, {min(others.values()):.2f} ({min(others, key=lambda n: others[n])}); "
                f"{gain:+.0f} %, {guard:+.0f} %",
                must="lowest; <= -15 %, <= 0 %",
                ok=bool(ours < min(others.values()) and gain <= -15 and guard <= 0),
            )
        )
        rivals = {n: np.mean([one[n]["fd"] for one in results.values()]) for n in RIVALS if _all(results, n)}
        report.judge(
            Row(
                number=7,
                what=f"{task.name}: FD of the default strategy, of the paper's evolution and random search",
                measured="; ".join([f"{ours:.2f}", *(f"{name} {value:.2f}" for name, value in rivals.items())]),
                must="lowest",
                ok=bool(ours < min(rivals.values())),
            )
        )


def _reduced(task: Task) -> Task:
    return replace(task, width=16, begin=20, every=10, count=8, samples=64, many=128)


def _has(one: dict[str, Any], name: str) -> bool:
    return name in one or name in one["baselines"]["scores"]


def _all(results: Results, name: str) -> bool:
    return all(_has(one, name) for one in results.values())


def _get(one: dict[str, Any], name: str) -> dict[str, float]:
    return one[name] if name in one else one["baselines"]["scores"][name]


def _changes(results: Results, name: str, what: str) -> np.ndarray:
    return np.array([100 * (_get(one, name)[what] / _get(one, "EMA grid")[what] - 1) for one in results.values()])


def _change(results: Results, name: str, what: str) -> str:
    found = _changes(results, name, what)
    return f"{found.mean():+.0f} % [{found.min():+.0f}, {found.max():+.0f}]"


def _spread(values: list[float], digits: int = 2) -> str:
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
