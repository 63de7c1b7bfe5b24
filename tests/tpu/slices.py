"""TPU slices without a TPU: libtpu compiles for topologies that it is only told of. Collectives and memory are read
from the compiled program."""

from __future__ import annotations

import math
import os
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask

import jax
import numpy as np
from jax.experimental import topologies

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
LARGE = ("v5e:16x16", "v5p:4x8x8", "v6e:16x16")  # 256 chips each
SLICES = SMALL + LARGE

_COLLECTIVE = re.compile(
    r"= (\S.*?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|send|recv)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


class Collective(NamedTuple):
    """One collective of a compiled program: what it does, and the bytes of its result on each device."""

    kind: str
    size_bytes: int


class Compiled(NamedTuple):
    """What a program does on each device of a slice."""

    text: str
    collectives: list[Collective]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    host_output_bytes: int
    host_temp_bytes: int


@cache
def devices(name: str) -> tuple[jax.Device, ...]:
    """The devices of a slice, by id; four to a process."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return tuple(sorted(found, key=lambda device: device.id))


def processes(name: str) -> int:
    return len({device.process_index for device in devices(name)})


def mesh(name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.sharding.Mesh:
    """A mesh over a whole slice whose last axes lie within processes."""
    by_process = sorted(devices(name), key=lambda device: (device.process_index, device.id))
    return jax.sharding.Mesh(np.array(by_process).reshape(shape), axes)


def compile_for_slice(function: Callable[..., Any], *args: Any) -> Compiled:
    """Compile a jitted function for arguments that are ShapeDtypeStructs on a slice."""
    compiled = function.lower(*args).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return Compiled(
        text=text,
        collectives=[Collective(kind, _size(result)) for result, kind in _COLLECTIVE.findall(text)],
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        host_output_bytes=memory.host_output_size_in_bytes,
        host_temp_bytes=memory.host_temp_size_in_bytes,
    )


def _size(result: str) -> int:
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * _bits(kind) // 8 for kind, shape in _ARRAY.findall(result)
    )


def _bits(kind: str) -> int:
    found = _BITS.search(kind)
    return 8 if kind == "pred" or found is None else int(found[0])
