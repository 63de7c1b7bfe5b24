"""``jaxckpt average``: a weighted sum of checkpoints, from a shell."""

import argparse
import json
from typing import Any

METHODS = ("uniform", "ema", "power")
EPILOG = """\
examples:
  jaxckpt average run/soup run/8000 run/9000 run/10000
  jaxckpt average run/line base tuned --weights=-0.5,1.5 --metric loss=0.113
  jaxckpt average run/ema --newest 20 --of run --method ema --decay 0.9 --only params
"""


def add_parser(commands: Any) -> None:
    """Add the command to those of ``jaxckpt``."""
    parser = commands.add_parser(
        "average",
        help="a weighted sum of checkpoints, saved with its lineage",
        description="Average checkpoints (ours or Orbax's). One model and one bucket are in memory, however many there "
        "are. Floating leaves are averaged; others are those of the last checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", help="where to save")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="checkpoints, oldest first")
    parser.add_argument("--of", metavar="RUN", help="take the sources from the folder of a run: its newest steps")
    parser.add_argument("--newest", type=int, default=6, metavar="K", help="how many of them (default 6)")
    parser.add_argument("--weights", type=_numbers, help="one number per source, separated by commas; any sign and sum")
    parser.add_argument("--method", choices=METHODS, default="uniform", help="the weights, where they are not given")
    parser.add_argument("--decay", type=float, default=0.9, help="of --method ema, per checkpoint (default 0.9)")
    parser.add_argument(
        "--sigma-rel",
        type=float,
        default=0.1,
        help="width of --method power, over the steps of the checkpoints (default 0.1)",
    )
    parser.add_argument("--only", action="append", metavar="GLOB", help="a name, subtree or glob; may be repeated")
    parser.add_argument(
        "--missing", choices=("error", "keep", "skip"), default="error", help="for leaves that some sources lack"
    )
    parser.add_argument(
        "--policy", action="append", type=_pair, metavar="GLOB=POLICY", help="average, first, last or equal_or_error"
    )
    parser.add_argument("--dtype", help="of the averaged leaves, as float32; that of the first source by default")
    parser.add_argument("--metric", type=_pair, metavar="NAME=VALUE", help="recorded in the lineage")
    parser.add_argument("--step", type=int, help="recorded; the step of the last source by default")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Average and save."""
    import jax

    from jaxckpt.averaging.average import average_to
    from jaxckpt.averaging.lawa import newest
    from jaxckpt.core.dtypes import dtype_of
    from jaxckpt.core.errors import InvalidArgumentError
    from jaxckpt.core.text import counted

    jax.config.update("jax_enable_x64", True)  # 64-bit leaves stay so
    if bool(options.sources) == bool(options.of):
        raise InvalidArgumentError("Name the checkpoints to average, or their run with --of.")
    sources = options.sources or [path for _, path in newest(options.of, options.newest)]
    try:
        dtype = None if options.dtype is None else dtype_of(options.dtype)
    except (TypeError, AttributeError) as error:
        raise InvalidArgumentError(f"{options.dtype!r} is no dtype: float32, bfloat16...") from error
    method, weights = _weights(options, sources)
    average_to(
        options.output,
        sources,
        weights,
        method=method,
        metric=_metric(options.metric),
        step=options.step,
        overwrite=options.overwrite,
        only=options.only,
        missing=options.missing,
        policy=dict(options.policy) if options.policy else None,
        dtype=dtype,
    )
    shown = ["equal weights"] if weights is None else [f"{weight:g}" for weight in weights]
    print(f"{options.output}: {counted(len(sources), 'checkpoint')}, {method}: {' '.join(shown)}")
    return 0


def _weights(options: argparse.Namespace, sources: list[Any]) -> tuple[str, list[float] | None]:
    from jaxckpt.averaging.ema import ema_weights
    from jaxckpt.averaging.lawa import recorded_steps
    from jaxckpt.averaging.posthoc import power_weights

    if options.weights is not None:
        return "given weights", options.weights
    if options.method == "ema":
        return f"ema of decay {options.decay:g}", ema_weights(len(sources), options.decay).tolist()
    if options.method == "power":
        steps = recorded_steps(sources)
        return f"power profile of width {options.sigma_rel:g}", power_weights(steps, options.sigma_rel).tolist()
    return "uniform", None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as 0.5,-0.25,0.75") from error


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} has no NAME=VALUE")
    return name, value


def _metric(pair: tuple[str, str] | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    try:
        value = json.loads(pair[1])
    except json.JSONDecodeError:
        value = pair[1]
    return {"name": pair[0], "value": value}
