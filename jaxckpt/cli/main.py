"""``jaxckpt inspect | verify | diff | average``: look at checkpoints, and combine them, from a shell."""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxckpt.cli.average import add_parser as add_average


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0, 1 (differences, damage), 2 (an error)."""
    # A command that only looks must not take an accelerator away from a running job.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxckpt.core.errors import CheckpointError

    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.run(options)
    except CheckpointError as error:
        print(f"jaxckpt: {error}".replace("overwrite=True", "--overwrite"), file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has seen enough (`jaxckpt inspect ... | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--weights -0.5,1.5`` as ``--weights=-0.5,1.5``: argparse takes what begins with a dash for an option."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] == "--weights":
            found[-1] = f"--weights={argument}"
        else:
            found.append(argument)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxckpt", description="Look at JAX checkpoints (ours and Orbax's), and combine them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="leaves, sizes, mesh and lineage; reads no array")
    inspect.add_argument("path")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="read everything and check every checksum")
    verify.add_argument("path")
    verify.set_defaults(run=_verify)
    diff = commands.add_parser("diff", help="compare two checkpoints leaf by leaf")
    diff.add_argument("a")
    diff.add_argument("b")
    diff.set_defaults(run=_diff)
    add_average(commands)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from jaxckpt.checkpoint.inspect import inspect

    print(inspect(options.path))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from jaxckpt.checkpoint.verify import verify

    report = verify(options.path)
    print(report)
    return 0 if report.ok else 1


def _diff(options: argparse.Namespace) -> int:
    from jaxckpt.checkpoint.inspect import diff

    found = diff(options.a, options.b)
    print(found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
