"""What a search costs beside its objective's own program, for a sampler and for a tiny objective.

    python benchmarks/lcsc_overhead.py [--quick]

Each search is a process of its own, with everything that a first search pays: imports, reading the checkpoints,
compiling the strategy, saving the state of every generation, the final scores and the merged model.
"""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from _common import Report, Row, Table, finish, parser, scratch, seconds

K = 40
POPULATION = 16


class Task(NamedTuple):
    what: str
    budget: int
    saves_state: bool


TASKS = {
    "sampler": Task("8-step sampler, 180,000 weights, 512 samples, Fréchet distance", 1024, True),
    "sampler, state not saved": Task("the same", 1024, False),
    "tiny": Task("a sum of squares of 4,160 weights", 1024, True),
    "tiny, state not saved": Task("the same", 1024, False),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--child", nargs=3, metavar=("TASK", "FOLDER", "BUDGET"), help=argparse.SUPPRESS)
    args = options.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.child:
        print(json.dumps(measured(args.child[0], Path(args.child[1]), int(args.child[2]))))
        return
    rounds = args.rounds or (1 if args.quick or args.tiny else 3)
    budget = 7 + 2 * POPULATION if args.tiny else 7 + 16 * POPULATION if args.quick else 7 + 64 * POPULATION
    report = Report("Overhead of a search")
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    with scratch(args.root) as folder:
        for turn in range(rounds):
            for name in TASKS:
                where = folder / f"{name} {turn}"
                command = [sys.executable, __file__, "--child", name, str(where), str(budget)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                told[name].append(json.loads(done.stdout.splitlines()[-1]))
    report.add(
        Table(
            title=f"cma_es, {K} checkpoints, {budget} evaluations, 16 at a time",
            columns=(
                "",
                "whole search, s",
                "in the objective's programs, s",
                "outside",
                "of it after the first",
                "one generation, outside, ms",
            ),
            rows=[
                (
                    name,
                    seconds([one["seconds"] for one in found]),
                    seconds([one["objective_seconds"] for one in found]),
                    f"{100 * outside(found):.1f} %",
                    f"{100 * median(one['steady'] for one in found):.1f} %",
                    f"{1e3 * median(one['generation'] for one in found):.1f}",
                )
                for name, found in told.items()
            ],
            note="'Outside' is all but the objective's programs: import of evosax, reading the checkpoints, compiling "
            "and running the strategy, saving, and the merged model. 'After the first': from the end of the first "
            "generation to the end of the last.",
        )
    )
    share = outside(told["sampler"])
    report.judge(
        Row(
            number=8,
            what="search: share of wall time outside the objective's own program, sampler, state saved",
            measured=f"{100 * share:.1f} % (tiny objective: {100 * outside(told['tiny']):.0f} %)",
            must="<= 10 %",
            ok=share <= 0.1,
        )
    )
    finish(report, args)


def outside(found: list[dict[str, Any]]) -> float:
    return median(1 - one["objective_seconds"] / one["seconds"] for one in found)


def measured(name: str, folder: Path, budget: int) -> dict[str, float]:
    import jax

    from jaxckpt import lcsc, save

    task = TASKS[name]
    make, objective = TINY if name.startswith("tiny") else SAMPLER
    paths = [str(folder / f"{k}") for k in range(K)]
    for k, path in enumerate(paths):
        save(path, make(jax.random.key(k)))
    seen: list[lcsc.Advance] = []
    state = str(folder / "state") if task.saves_state else None
    score = objective()  # the moments of its reference are the task's own
    started = time.perf_counter()
    found = lcsc.search(paths, score, budget=budget, population=POPULATION, state=state, progress=seen.append)
    jax.block_until_ready(found.params)
    whole = time.perf_counter() - started
    between = max(seen[-1].seconds - seen[0].seconds, 1e-9)
    idle = between - (seen[-1].objective_seconds - seen[0].objective_seconds)
    return {
        "seconds": whole,
        "objective_seconds": found.report.objective_seconds,
        "steady": idle / between,
        "generation": idle / max(len(seen) - 1, 1),
    }


def make_tiny(key: Any) -> Any:
    import jax

    a, b = jax.random.split(key)
    return {"a": jax.random.normal(a, (64, 64)), "b": jax.random.normal(b, (64,))}


def tiny() -> Callable[..., Any]:
    import jax

    def objective(params: Any, key: Any) -> Any:
        return (params["a"] ** 2).sum() + (params["b"] ** 2).sum() + 0.01 * jax.random.normal(key, ())

    return objective


HIDDEN, PIXELS, STEPS, SAMPLES = 256, 64, 8, 512


def make_sampler(key: Any) -> Any:
    import jax

    shapes = [(PIXELS + 1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, PIXELS)]
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(one, shape) / np.sqrt(shape[0]), "b": np.zeros(shape[1], np.float32)}
        for one, shape in zip(keys, shapes, strict=True)
    ]


def sampler() -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    from jaxckpt.lcsc import metrics

    reference = metrics.moments(jax.random.normal(jax.random.key(9), (1000, PIXELS)))

    def network(params: Any, x: Any, t: Any) -> Any:
        x = jnp.concatenate([x, jnp.full((len(x), 1), t)], axis=1)
        for layer in params[:-1]:
            x = jax.nn.gelu(x @ layer["w"] + layer["b"][None])
        return x @ params[-1]["w"] + params[-1]["b"][None]

    def objective(params: Any, key: Any) -> Any:
        x = jax.random.normal(key, (SAMPLES, PIXELS))
        x, _ = jax.lax.scan(lambda x, t: (x - network(params, x, t) / STEPS, None), x, jnp.linspace(1, 0, STEPS))
        return metrics.frechet_distance(x, reference)

    return objective


TINY = (make_tiny, tiny)
SAMPLER = (make_sampler, sampler)

if __name__ == "__main__":
    main()
