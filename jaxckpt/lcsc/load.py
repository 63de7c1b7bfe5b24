"""Where the checkpoints of a search are: stacked on devices if they fit, else in host memory, else on storage."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt.averaging.average import average_opened
from jaxckpt.averaging.onmesh import stacked_sharding
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.evaluate import Assembled, Evaluator, Hosted, Resident, Streamed, chunk_of, on_device
from jaxckpt.lcsc.merge import Lora, is_stacked, make_form, names_of, summed
from jaxckpt.lcsc.space import Space

PyTree = Any
Placement = Literal["auto", "device", "host", "stream"]
SMALL_BYTES = 64 * 1024 * 1024  # a stack of this size is put together on the host before the programs for it compile
_SHARE = 0.5  # of free memory that the stack may take


def make_evaluator(
    sources: Sequence[Source],
    last: PyTree,
    space: Space,
    *,
    how: dict[str, Any],
    lora: Lora | None,
    placement: Placement,
    is_jitted: bool,
    population: int,
    memory_bytes: int,
    mesh: Mesh | None,
    axis: str,
) -> Evaluator:
    """What evaluates populations, by the place that the checkpoints have; ``last`` is the last one, loaded."""
    if placement not in ("auto", "device", "host", "stream"):
        raise InvalidArgumentError(f'placement is {placement!r}; it is "auto", "device", "host" or "stream".')
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InvalidArgumentError(f"mesh is {mesh!r}; give a jax.sharding.Mesh, as jax.make_mesh makes it.")
    if mesh is not None and axis not in mesh.axis_names:
        raise InvalidArgumentError(f"axis is {axis!r}; the mesh has {mesh.axis_names}.")
    read = partial(loaded, sources, how)
    form = make_form(last, space, lora)
    spreads = mesh is not None
    mesh = mesh if mesh is not None else _mesh_of(last)
    on_mesh = None if mesh is None else _auto(mesh)
    leaves = [_placed(leaf, on_mesh, spreads) for leaf in jax.tree.leaves(last) if is_stacked(leaf)]
    if on_mesh is not None:
        specs = tuple(leaf.sharding.spec for leaf in leaves if isinstance(leaf.sharding, NamedSharding))
        form = replace(form, mesh=on_mesh, axis=axis if spreads else None, specs=specs)
    multiple = mesh.shape[axis] if spreads and mesh is not None else 1
    chunk = chunk_of(population, _largest_bytes(leaves), memory_bytes, multiple)

    where = _choose(leaves, space.count) if placement == "auto" else placement
    if where == "stream":
        if form.pairs:
            raise InvalidArgumentError(
                'Products of LoRA factors need placement="device" or "host"; the factors alone (only=...) are small.'
            )
        return Streamed(make=_streamed(sources, space, how), form=form, chunk=chunk, is_jitted=is_jitted)
    place = partial(_placed, mesh=on_mesh, spreads=spreads)
    if where == "host":
        models = [
            [_to_host(place(leaf)) for leaf in jax.tree.leaves(read(k)) if is_stacked(leaf)]
            for k in range(space.count - 1)
        ]
        models.append([_to_host(leaf) for leaf in leaves])
        hosted = Hosted(models=models, shardings=[leaf.sharding for leaf in leaves], form=form)
        return Assembled(make=hosted, form=form, chunk=chunk, is_jitted=is_jitted, placement="host")
    stacked = stack(
        lambda k: [place(leaf) for leaf in jax.tree.leaves(read(k)) if is_stacked(leaf)], leaves, space.count
    )
    if not is_jitted:
        return Assembled(make=on_device(stacked, form), form=form, chunk=chunk, is_jitted=False, placement="device")
    return Resident(stacked=stacked, form=form, width=population, chunk=chunk)


def with_products(params: PyTree, evaluate: Evaluator, coefficients: np.ndarray) -> PyTree:
    """Merged parameters with the products of LoRA factors in place of their separate sums; products in float32."""
    if not isinstance(evaluate, Resident | Assembled) or not evaluate.form.pairs:
        return params
    make = on_device(evaluate.stacked, evaluate.form) if isinstance(evaluate, Resident) else evaluate.make
    made = make(np.asarray(coefficients, np.float32)[None])
    leaves, structure = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if is_stacked(leaf)]
    for pair in evaluate.form.pairs:
        for one in (pair.left, pair.right):
            old, new = leaves[places[one]], made[one][0].astype(leaves[places[one]].dtype)
            leaves[places[one]] = jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else np.asarray(new)
    return structure.unflatten(leaves)


def stack(read: Callable[[int], Sequence[Any]], last: Sequence[Any], count: int) -> list[jax.Array]:
    """Leaves [K, ...], sharded on their trailing axes as the checkpoints are; every device holds its part of all K.

    Filled one checkpoint after another: in memory are the stack and one model. Leaves that are not summed are those of
    the last checkpoint, [1, ...].
    """
    places = [i for i, leaf in enumerate(last) if summed(leaf)]
    summed_leaves = [last[i] for i in places]
    shardings = tuple(stacked_sharding(leaf.sharding) or leaf.sharding for leaf in summed_leaves)
    if all(leaf.is_fully_addressable for leaf in summed_leaves) and count * _bytes(summed_leaves) <= SMALL_BYTES:
        filled = [np.empty((count, *leaf.shape), leaf.dtype) for leaf in summed_leaves]
        for k in range(count):
            found = read(k) if k < count - 1 else last
            for rows, i in zip(filled, places, strict=True):
                rows[k] = found[i]
        filled = [jax.device_put(rows, sharding) for rows, sharding in zip(filled, shardings, strict=True)]
    else:
        filled = _room(count, shardings)(summed_leaves)
        for k in range(count - 1):
            found = read(k)
            filled = _put(filled, [found[i] for i in places], k)
    stacked = [leaf[None] if i not in places else leaf for i, leaf in enumerate(last)]
    for i, leaf in zip(places, filled, strict=True):
        stacked[i] = leaf
    return stacked


def _bytes(leaves: Sequence[jax.Array]) -> int:
    return sum(leaf.nbytes for leaf in leaves)


@lru_cache(maxsize=64)
def _room(count: int, shardings: tuple[Any, ...]) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Makes room for ``count`` of each leaf, and fills the last place."""

    def make(leaves: list[jax.Array]) -> list[jax.Array]:
        return [jnp.zeros((count, *leaf.shape), leaf.dtype).at[count - 1].set(leaf) for leaf in leaves]

    return jax.jit(make, out_shardings=list(shardings))


@partial(jax.jit, donate_argnums=0)
def _put(stacked: list[jax.Array], leaves: list[jax.Array], k: Any) -> list[jax.Array]:
    found = zip(stacked, leaves, strict=True)
    return [jax.lax.dynamic_update_index_in_dim(stack, leaf, k, 0) for stack, leaf in found]


def loaded(sources: Sequence[Source], how: dict[str, Any], k: int) -> PyTree:
    """The parameters of one checkpoint."""
    return average_opened(sources[k : k + 1], [1.0], **how)


def not_finite(sources: Sequence[Source], how: dict[str, Any]) -> list[str]:
    """Names of the checkpoints that hold NaN or infinity, with the first leaf of each that does."""
    found: list[str] = []
    for k, source in enumerate(sources):
        tree = loaded(sources, how, k)
        named = zip(names_of(tree), jax.tree.leaves(tree), strict=True)
        wrong = next((name for name, leaf in named if summed(leaf) and not bool(jnp.isfinite(leaf).all())), None)
        if wrong is not None:
            found.append(f'{source.url} (checkpoint {k}, leaf "{wrong}")')
    return found


def _streamed(sources: Sequence[Source], space: Space, how: dict[str, Any]) -> Callable[[np.ndarray], list[PyTree]]:
    def make(coefficients: np.ndarray) -> list[PyTree]:
        weights = {group: coefficients[:, i] for i, group in enumerate(space.groups)}
        return average_opened(sources, weights, **how)

    return make


def _placed(leaf: Any, mesh: Mesh | None, spreads: bool) -> jax.Array:
    """On the mesh, with the layout that it has there already, or else whole on every device of it.

    Axes are of type Auto, so that XLA partitions the objective as it finds best.
    """
    array = leaf if isinstance(leaf, jax.Array) else jax.device_put(np.float32(leaf) if type(leaf) is float else leaf)
    if mesh is None:
        return array
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        there = sharding.mesh
        if (
            isinstance(there, Mesh)
            and there.axis_names == mesh.axis_names
            and np.array_equal(there.devices, mesh.devices)
        ):
            return jax.device_put(array, NamedSharding(mesh, sharding.spec))
        if not spreads:
            raise InvalidArgumentError("The parameters lie on several meshes; give `like` shardings on one.")
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def _mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh that the parameters lie on, if they do."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None


def _auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names)


def _to_host(leaf: jax.Array) -> Any:
    """In pinned host memory, every device's part apart; where devices have no memory of their own, as it is."""
    if next(iter(leaf.sharding.device_set)).platform == "cpu":
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))


def _largest_bytes(leaves: Sequence[jax.Array]) -> int:
    """Of a model, on one device."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _choose(leaves: Sequence[jax.Array], count: int) -> Placement:
    """Device memory if half of what is free holds the stack, else half of the host's, else storage."""
    devices = {one for leaf in leaves for one in leaf.sharding.addressable_devices}
    on_one = count * _largest_bytes(leaves)
    on_host = on_one * len(devices)
    fits_host = on_host <= _SHARE * host_free_bytes()
    if all(device.platform == "cpu" for device in devices):
        return "device" if fits_host else "stream"
    free = [_free_bytes(device) for device in devices]
    if on_one <= _SHARE * min(free):
        return "device"
    return "host" if fits_host else "stream"


def _free_bytes(device: jax.Device) -> float:
    """What is free on a device; without end where the backend does not tell."""
    stats = device.memory_stats()
    return float("inf") if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats["bytes_in_use"]


def host_free_bytes() -> int:
    """Memory of this machine that can be had without swapping; half of all where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return _half()
    return _half()


def _half() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
