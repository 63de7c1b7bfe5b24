"""The programs of a search and of averages on TPU slices: stacked checkpoints stay where they lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt.averaging.combine import combine
from jaxckpt.averaging.onmesh import _add, _finish, _start, stacked_sharding
from jaxckpt.lcsc.evaluate import Program, _contracted, _scores, _slopes
from jaxckpt.lcsc.merge import Form, Lora, make_form
from jaxckpt.lcsc.selection import Penalty
from jaxckpt.lcsc.space import Space
from tests.tpu.slices import LARGE, SMALL, Compiled, compile_for_slice, devices, mesh

COUNT, WIDTH = 40, 16
LAYERS, HIDDEN = 2, 512
LAYOUTS = {  # of the weights; candidates are spread over "data"
    "over model": (PartitionSpec(None, "model"), PartitionSpec("model")),
    "over data and model": (PartitionSpec("data", "model"), PartitionSpec("model")),
    "whole on every device": (PartitionSpec(), PartitionSpec()),
}
MODEL_BYTES = LAYERS * (HIDDEN * HIDDEN + 2 * HIDDEN) * 2


def objective(params: Any, key: jax.Array) -> jax.Array:
    """A sampler: pairs of a layer over the model axis."""
    x = jax.random.normal(key, (256, HIDDEN), jnp.bfloat16)
    for layer in params:
        x = x + jax.nn.gelu(x @ layer["in"] + layer["b"][None]) @ layer["in"].T + layer["c"][None]
    return (x.astype(jnp.float32) ** 2).mean()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "chunk"), [*((name, 16) for name in SMALL), ("v5e:4x4", 4)])
def test_no_device_gathers_stacked_checkpoints(name: str, layout: str, chunk: int) -> None:
    found, stack_bytes = evaluation(name, (4, 4), layout, chunk)
    assert found.argument_bytes >= stack_bytes
    _assert_no_stack_moves(found, chunk)


@pytest.mark.parametrize("name", LARGE[:1])
def test_no_device_of_256_gathers_stacked_checkpoints(name: str) -> None:
    found, _ = evaluation(name, (16, 16), "over model", 16)
    _assert_no_stack_moves(found, 16)


def test_each_device_has_its_candidates_and_its_part_of_them() -> None:
    """The temporary memory is that of some models over the slice, and not of the population on every device."""
    found, _ = evaluation("v5e:4x4", (4, 4), "over model", 16)
    part = MODEL_BYTES / 4  # of a model, on a device
    assert found.temp_bytes <= (16 / 4 + 2) * part + 64 * 2**20, found.temp_bytes / part


@pytest.mark.parametrize("layout", ["over model", "over data and model"])
def test_gradients_of_the_coefficients_gather_no_stack(layout: str) -> None:
    on, form, stacked, _ = parts("v5e:4x4", (4, 4), layout)
    form = replace(form, axis=None)
    space = Space(count=COUNT)
    everywhere = NamedSharding(on, PartitionSpec())
    y = jax.ShapeDtypeStruct((1, COUNT), jnp.float32, sharding=everywhere)
    centre = jax.ShapeDtypeStruct((1, COUNT), jnp.float32, sharding=everywhere)
    data = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere)
    program = Program(objective, form, 1, "threefry2x32")
    found = compile_for_slice(_slopes, program, space, Penalty(0.1, 0.0), stacked, y, centre, data)
    _assert_no_stack_moves(found, 1)


def test_buckets_from_host_memory_are_summed_where_they_arrive() -> None:
    on, form, stacked, _ = parts("v5e:4x4", (4, 4), "over data and model")
    form = replace(form, structure=None)
    models = [
        [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=NamedSharding(on, spec)) for _ in range(COUNT)]
        for leaf, spec in zip(stacked, form.specs, strict=True)
    ]
    found = compile_for_slice(_contracted, models, _coefficients(on), form)
    assert not found.collectives


def test_products_of_factors_gather_nothing() -> None:
    """Batches of layers over the model axis: each device cuts the products of its layers."""
    on = mesh("v5e:4x4", (4, 4), ("data", "model"))
    spec = PartitionSpec("model")
    shapes = {"lora_a": (4, 512, 8), "lora_b": (4, 8, 512)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    form = replace(make_form(tree, Space(count=COUNT), Lora(rank="exact")), mesh=on, axis="data", specs=(spec,) * 2)
    stacked = [
        jax.ShapeDtypeStruct((COUNT, *s), jnp.bfloat16, sharding=NamedSharding(on, PartitionSpec(None, *spec)))
        for s in shapes.values()
    ]

    def norm(params: Any, key: jax.Array) -> jax.Array:
        return ((params["lora_a"] @ params["lora_b"]).astype(jnp.float32) ** 2).mean()

    program = Program(norm, form, WIDTH, "threefry2x32")
    found = compile_for_slice(_scores, program, stacked, _coefficients(on), _key(on))
    assert {c.kind for c in found.collectives} <= {"all-reduce", "all-gather"}
    assert sum(c.size_bytes for c in found.collectives) < 64 * 1024


@pytest.mark.parametrize(("name", "models"), [*((name, None) for name in SMALL), ("v5e:4x4", 4)])
def test_combine_moves_nothing_between_devices(name: str, models: int | None) -> None:
    on = mesh(name, (4, 4), ("data", "model"))
    stacked = {
        "w": jax.ShapeDtypeStruct(
            (20, 2048, 2048), jnp.bfloat16, sharding=NamedSharding(on, PartitionSpec(None, "data", "model"))
        ),
        "b": jax.ShapeDtypeStruct((20, 2048), jnp.float32, sharding=NamedSharding(on, PartitionSpec(None, "model"))),
    }
    weights = np.linspace(-1, 1, 20) if models is None else np.linspace(-1, 1, 20 * models).reshape(models, 20)
    found = compile_for_slice(jax.jit(lambda s: combine(s, weights, accumulate="float32")), stacked)
    assert not found.collectives
    assert found.temp_bytes <= 2 * found.output_bytes + 2**20


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_sums_of_an_average_are_kept_in_place(name: str, models: int) -> None:
    """One donating multiply-add per source: no collective, and no memory beyond the accumulators.

    For several results the parts of the term that they share are a few arrays of its size.
    """
    on = mesh(name, (4, 4), ("data", "model"))
    home = NamedSharding(on, PartitionSpec("data", "model"))
    value = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=home)
    weights = jax.ShapeDtypeStruct((3, models, 1), jnp.float32, sharding=NamedSharding(on, PartitionSpec()))
    shard = 8192 * 8192 // 16
    first = compile_for_slice(_start(home, "float32"), value, weights)
    sums = jax.ShapeDtypeStruct((models, *value.shape), jnp.float32, sharding=stacked_sharding(home))
    total = [(sums, sums)]
    added = compile_for_slice(_add(home, "float32"), value, weights, total)
    ended = compile_for_slice(_finish(home, np.dtype(jnp.bfloat16)), total)
    for found in (first, added, ended):
        assert not found.collectives
        assert found.temp_bytes < 2**20 + (4 * 4 * shard if models > 1 else 0)
    assert added.alias_bytes == 2 * 4 * shard * models
    assert 0 <= ended.output_bytes - 2 * shard * models < 1024  # and the table of several results


def parts(name: str, shape: tuple[int, int], layout: str) -> tuple[Any, Form, list[Any], int]:
    """The mesh, the form of a candidate, its stack, and the bytes of that on a device."""
    on = mesh(name, shape, ("data", "model"))
    assert on.size == len(devices(name))
    matrix, vector = LAYOUTS[layout]
    layer = {"in": ((HIDDEN, HIDDEN), matrix), "b": ((HIDDEN,), vector), "c": ((HIDDEN,), PartitionSpec())}
    leaves, structure = jax.tree.flatten([layer] * LAYERS, is_leaf=lambda x: isinstance(x, tuple))
    tree = structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape, _ in leaves])
    specs = tuple(spec for _, spec in leaves)
    form = replace(make_form(tree, Space(count=COUNT), None), mesh=on, axis="data", specs=specs)
    stacked = [
        jax.ShapeDtypeStruct((COUNT, *shape), jnp.bfloat16, sharding=NamedSharding(on, PartitionSpec(None, *spec)))
        for shape, spec in leaves
    ]
    here = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 2 for leaf in stacked if leaf.sharding)
    return on, form, stacked, here


def evaluation(name: str, shape: tuple[int, int], layout: str, chunk: int) -> tuple[Compiled, int]:
    """The compiled program of a generation, and the bytes of the stack on each device."""
    on, form, stacked, here = parts(name, shape, layout)
    program = Program(objective, form, chunk, "threefry2x32")
    return compile_for_slice(_scores, program, stacked, _coefficients(on), _key(on)), here


def _assert_no_stack_moves(found: Compiled, chunk: int) -> None:
    """No collective has an operand with an axis of all checkpoints, and none is as large as one stacked leaf."""
    for line in found.text.splitlines():
        if any(f" {kind}(" in line or f" {kind}-start(" in line for kind in ("all-gather", "all-to-all")):
            assert f"[{COUNT}," not in line, line
            assert f",{COUNT}," not in line, line
    largest = max((c.size_bytes for c in found.collectives), default=0)
    assert largest <= chunk * HIDDEN * HIDDEN * 2, "more than this chunk's sums of a leaf"
    assert largest < COUNT * HIDDEN * HIDDEN * 2


def _coefficients(on: Any) -> Any:
    return jax.ShapeDtypeStruct((WIDTH, 1, COUNT), jnp.float32, sharding=NamedSharding(on, PartitionSpec()))


def _key(on: Any) -> Any:
    return jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=NamedSharding(on, PartitionSpec()))
