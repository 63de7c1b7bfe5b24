"""What a search found and how: a table, JSON, plots, and a checkpoint that says where it comes from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxckpt.checkpoint.lineage import Lineage
from jaxckpt.checkpoint.save import save
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted
from jaxckpt.lcsc.selection import Penalty, Row
from jaxckpt.storage.url import Location, StorageOptions

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How the search went.

    Attributes:
        rows: the finalists and the references, scored alike on fresh noise.
        chosen: name of the row that is the result.
        fitness: float64 [generations, P], noisy, as the search saw it, penalty included.
        path: float64 [generations, G, K]: the search mean (or the best candidate) after each generation.
        groups: globs of leaf names, G of them.
        evaluations: of single models by the search, profiles included; the final scores are not.
        final_evaluations: of single models for the final scores: rows times draws, for each metric.
        seconds: of this process; ``objective_seconds`` of them were spent in evaluation.
        settings: strategy, its options, space, noise, seed, and what the caller recorded: metric, sampler, NFE.
        concerns: what was warned of.
        profiles: noisy score of each EMA profile that was measured first, by decay.
        steps: training steps of the checkpoints, where they are known.
        placement: where the checkpoints were while they were searched over.
    """

    rows: tuple[Row, ...]
    chosen: str
    fitness: np.ndarray
    path: np.ndarray
    groups: tuple[str, ...]
    evaluations: int
    final_evaluations: int
    seconds: float
    objective_seconds: float
    settings: dict[str, Any]
    concerns: tuple[str, ...]
    profiles: dict[float, float]
    steps: tuple[int | None, ...]
    placement: str

    def row(self, name: str) -> Row:
        """The row of this name."""
        for one in self.rows:
            if one.name == name:
                return one
        raise InvalidArgumentError(f"There is no row {name!r}; there are {[one.name for one in self.rows]}.")

    def __str__(self) -> str:
        """A table, best score first."""
        rows = sorted(self.rows, key=lambda row: row.score)
        columns: dict[str, list[float | None]] = {
            "score": [one.score for one in rows],
            "guard": [one.guard for one in rows],
            "held out": [one.held_out for one in rows],
            "sum |a|": [one.l1 for one in rows],
            "negative": [one.negative_mass for one in rows],
            "largest": [one.largest for one in rows],
        }
        told = {title: values for title, values in columns.items() if any(value is not None for value in values)}
        lines = [" ".join([f"{'':12}", *(f"{title:>10}" for title in told)])]
        for i, one in enumerate(rows):
            numbers = [f"{'' if values[i] is None else f'{values[i]:.4g}':>10}" for values in told.values()]
            lines.append(" ".join([f"{one.name:12}", *numbers]) + ("  <- chosen" if one.name == self.chosen else ""))
        lines.append(
            f"{counted(self.evaluations, 'evaluation')} and {self.final_evaluations} for the final scores in "
            f"{self.seconds:.1f} s ({self.objective_seconds:.1f} s of them in the objective's programs), checkpoints "
            f"on: {self.placement}"
        )
        settings = {name: value for name, value in self.settings.items() if value is not None and name not in _LONG}
        lines.append("; ".join(f"{name}: {_short(value)}" for name, value in settings.items()))
        return "\n".join([*lines, *self.concerns])

    def to_json(self) -> dict[str, Any]:
        """JSON values, as for the metadata of the merged checkpoint; what is not finite is None."""
        return {
            "chosen": self.chosen,
            "evaluations": self.evaluations,
            "final_evaluations": self.final_evaluations,
            "seconds": self.seconds,
            "objective_seconds": self.objective_seconds,
            "placement": self.placement,
            "steps": list(self.steps),
            "profiles": {f"{decay:g}": _plain(score) for decay, score in self.profiles.items()},
            "groups": list(self.groups),
            "settings": self.settings,
            "concerns": list(self.concerns),
            "rows": [
                {
                    "name": one.name,
                    "coefficients": one.coefficients.tolist(),
                    "score": _plain(one.score),
                    "guard": _plain(one.guard),
                    "held_out": _plain(one.held_out),
                    "negative_mass": one.negative_mass,
                    "l1": one.l1,
                    "largest": one.largest,
                }
                for one in self.rows
            ],
            "search": {
                "best": [_plain(np.nanmin(row)) if np.isfinite(row).any() else None for row in self.fitness],
                "mean": [_plain(np.mean(row)) for row in self.fitness],
                "path": [[[_plain(a) for a in group] for group in one] for one in self.path],
            },
        }

    def save(self, folder: str | Path, *, steps: Any = None) -> None:
        """Write ``report.md`` (the table, and the plot in it), ``search.png`` and ``report.json`` into a folder."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        self.plot(where / "search.png", steps=steps)
        (where / "report.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        (where / "report.md").write_text(f"# Search for coefficients\n\n```\n{self}\n```\n\n![search](search.png)\n")

    def plot(self, path: str | Path, *, steps: Any = None) -> None:
        """Save a PNG: fitness by evaluation, and the coefficients over the training steps (or their numbers)."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InvalidArgumentError('A plot needs matplotlib: pip install "jaxckpt[search]".') from error
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        if steps is None and None not in self.steps and len(set(self.steps)) == len(self.steps):
            steps = self.steps
        at = (np.arange(len(self.fitness)) + 1) * self.fitness.shape[1]
        left.plot(at, self.fitness.mean(1), label="mean of the generation")
        left.plot(at, self.fitness.min(1), label="best of the generation (noisy)")
        left.axhline(self.row(self.chosen).score, color="black", linestyle=":", label="chosen, on fresh noise")
        left.set(xlabel="evaluations", ylabel="objective", title="search")
        left.legend()
        chosen, start = self.row(self.chosen).coefficients, self.row("profile").coefficients
        where = np.arange(chosen.shape[1]) if steps is None else np.asarray(steps)
        right.plot(where, start[0], color="gray", linestyle="--", label="best EMA profile")
        for group, one in zip(self.groups, chosen, strict=True):
            right.plot(where, one, marker=".", label=group)
        right.axhline(0, color="black", linewidth=0.5)
        right.set(xlabel="checkpoint" if steps is None else "training step", ylabel="coefficient", title="coefficients")
        right.legend()
        FigureCanvasAgg(figure).print_figure(str(path), format="png", dpi=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """``coefficients`` float64 [K], or [G, K] with several groups; ``params``: the merged tree, as ``like``.

    ``sources``: (place, step) of each checkpoint.
    """

    coefficients: np.ndarray
    params: PyTree
    report: Report
    sources: tuple[tuple[str, int | None], ...] = ()

    def save(
        self, path: Location, *, step: int | None = None, overwrite: bool = False, options: StorageOptions | None = None
    ) -> None:
        """Save the merged parameters as an ordinary checkpoint, with the report in its metadata.

        Its lineage names the checkpoints, their coefficients, strategy and metric; with several groups the
        coefficients are in the metadata alone.

        Args:
            path: as of ``jaxckpt.save``.
            step: of the new checkpoint; that of the last source by default.
            overwrite: replace a checkpoint that is there.
            options: endpoint, region and credentials of object stores.
        """
        one = self.coefficients.ndim == 1
        parents = [
            Lineage(path=place, step=at, weight=float(self.coefficients[k]) if one else None, method="lcsc")
            for k, (place, at) in enumerate(self.sources)
        ]
        chosen, settings = self.report.row(self.report.chosen), self.report.settings
        penalty = Penalty(settings.get("l1_penalty") or 0.0, settings.get("negative_penalty") or 0.0)
        added = float(penalty(chosen.coefficients[None])[0])
        averaging = {
            "method": "lcsc",
            "weights": self.coefficients.tolist()
            if one
            else dict(zip(self.report.groups, self.coefficients.tolist(), strict=True)),
            "metric": {**settings.get("record", {}), "value": _plain(chosen.score - added), "penalty": added},
        }
        save(
            path,
            self.params,
            step=step if step is not None else (self.sources[-1][1] if self.sources else None),
            overwrite=overwrite,
            metadata={"averaging": averaging, "lcsc": self.report.to_json()},
            parents=parents,
            options=options,
        )


_LONG = ("sources", "parameters")  # settings that are no use in a table


def _plain(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
