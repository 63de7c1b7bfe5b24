"""The LLaMA of ``models.llama`` as a pipeline over the mesh axis "stage".

Parameters are a dict: "embedding", "norm", "head", and "stages", whose leaves are stacked [stages, layers, ...], or
[repeats, stages, layers, ...] in the circular schedule of MaxText, where block r * stages + s lies on stage s. The axis
"stage" is manual (shard_map and ppermute); "data" and "model" are left to the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.llama import Layer, LlamaConfig, rotation_tables
from models.schedule import Schedule, make_schedule, stage_order
from models.sharding import FSDP, TENSOR_PARALLEL, partition_spec

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """A model in stages. ``swap`` is the out-of-order half of CheckFree+."""

    model: LlamaConfig
    stages: int
    microbatches: int
    repeats: int = 1
    swap: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if self.model.layers % (self.stages * self.repeats):
            raise ValueError(
                f"layers={self.model.layers} do not divide into stages={self.stages} x repeats={self.repeats}."
            )
        if self.model.tied or self.model.dropout:
            raise ValueError("A pipeline needs tied=False and dropout=0.0.")
        make_schedule(self.stages, self.microbatches, self.repeats, swap=self.swap)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of a stage's leaves."""
        layers = self.model.layers // (self.stages * self.repeats)
        return (self.stages, layers) if self.repeats == 1 else (self.repeats, self.stages, layers)


def make_pipeline_mesh(stage: int, data: int = 1, model: int = 1) -> Mesh:
    """A mesh of the first ``stage * data * model`` devices."""
    shape = (stage, data, model)
    devices = jax.devices()[: stage * data * model]
    return jax.make_mesh(shape, ("stage", "data", "model"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def init_params(config: PipelineConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, unplaced: jit it with ``out_shardings=param_shardings(config, mesh)``."""
    model = config.model
    keys = jax.random.split(key, 3)

    def layer(key: jax.Array) -> nnx.State:
        return nnx.state(Layer(model, rngs=nnx.Rngs(params=key)), nnx.Param)

    stages = jax.vmap(layer)(jax.random.split(keys[0], model.layers))
    return {
        "embedding": _normal(keys[1], (model.vocab, model.embed), model),
        "stages": jax.tree.map(lambda leaf: leaf.reshape(*config.stack, *leaf.shape[1:]), nnx.to_pure_dict(stages)),
        "norm": jnp.ones((model.embed,), model.param_dtype),
        "head": _normal(keys[2], (model.embed, model.vocab), model),
    }


def abstract_params(config: PipelineConfig) -> dict[str, Any]:
    """Shapes and dtypes; allocates nothing."""
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def param_shardings(config: PipelineConfig, mesh: Mesh, *, fsdp: bool = False) -> dict[str, Any]:
    """Stages over "stage", the rest of each leaf as in ``models.sharding``."""
    rules = FSDP if fsdp else TENSOR_PARALLEL
    abstract = abstract_params(config)
    lead = (None,) * (len(config.stack) - 2) + ("stage", None)
    axes = {name: leaf.get_metadata().get("axes", ()) for name, leaf in nnx.to_flat_state(_layer_state(config.model))}

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = tuple(entry.key for entry in path)
        if keys[0] == "stages":
            rest = partition_spec(axes[keys[1:]], leaf.shape[len(lead) :], mesh, rules)
            return NamedSharding(mesh, PartitionSpec(*lead, *rest))
        names = {"embedding": ("vocab", "embed"), "norm": ("norm",), "head": ("embed", "vocab")}[keys[0]]
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, abstract)


def pipeline_loss(config: PipelineConfig, mesh: Mesh, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of tokens (batch, length + 1); batch divides by the microbatches. Differentiable."""
    x, targets = _microbatches(config, params, tokens)
    schedule = make_schedule(config.stages, config.microbatches, config.repeats, swap=config.swap)
    lead = (None,) * (len(config.stack) - 2)
    run = jax.shard_map(
        partial(_run, config, schedule),
        mesh=mesh,
        in_specs=(PartitionSpec("stage"), PartitionSpec(*lead, "stage"), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"stage"},
    )
    x = run(jnp.arange(config.stages, dtype=jnp.int32), params["stages"], x)
    return _cross_entropy(config, params, x, targets)


def sequential_loss(config: PipelineConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    """The same loss, layer after layer in the order in which each microbatch visits the stages."""
    x, targets = _microbatches(config, params, tokens)
    blocks = jax.tree.map(lambda leaf: leaf[None] if config.repeats == 1 else leaf, params["stages"])
    done = []
    for m in range(config.microbatches):
        y = x[m]
        for r in range(config.repeats):
            for s in stage_order(config.stages, swapped=config.swap and m % 2 == 1):
                y = _stage(config, jax.tree.map(lambda leaf, at=(r, s): leaf[at], blocks), y)
        done.append(y)
    return _cross_entropy(config, params, jnp.stack(done), targets)


def _run(config: PipelineConfig, schedule: Schedule, stage: jax.Array, params: PyTree, x: jax.Array) -> jax.Array:
    me = stage[0]  # an argument, not axis_index: the compiler cannot partition that beside axes of its own
    # One slot per microbatch, and one more where what nobody sent is thrown away.
    buffer = jax.lax.pcast(jnp.concatenate([x, jnp.zeros_like(x[:1])]), "stage", to="varying")
    slots = [jnp.where(table < 0, config.microbatches, table) for table in _tables(schedule)]
    stage_fn = jax.checkpoint(partial(_stage, config)) if config.remat else partial(_stage, config)

    def tick(buffer: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        work, repeat, first, second = (jax.lax.dynamic_index_in_dim(part, me, keepdims=False) for part in row)
        if config.repeats == 1:
            mine = jax.tree.map(lambda leaf: leaf[0], params)
        else:
            mine = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf[:, 0], repeat, keepdims=False), params)
        y = stage_fn(mine, jax.lax.dynamic_index_in_dim(buffer, work, keepdims=False))
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, y, work, 0)
        for edges, slot in ((schedule.plain_edges, first), (schedule.swapped_edges, second)):
            if edges:
                moved = jax.lax.ppermute(y, "stage", edges)
                buffer = jax.lax.dynamic_update_index_in_dim(buffer, moved, slot, 0)
        return buffer, None

    buffer, _ = jax.lax.scan(tick, buffer, (slots[0], jnp.asarray(schedule.repeat), slots[1], slots[2]))
    mine = (jnp.asarray(schedule.last_stage) == me)[:, None, None, None]
    return jax.lax.psum(jnp.where(mine, buffer[:-1], jnp.zeros_like(x)), "stage")


def _tables(schedule: Schedule) -> list[jax.Array]:
    return [jnp.asarray(t) for t in (schedule.microbatch, schedule.from_plain, schedule.from_swapped)]


def _stage(config: PipelineConfig, params: PyTree, x: jax.Array) -> jax.Array:
    rotation = rotation_tables(x.shape[1], config.model)

    def one(x: jax.Array, layer: PyTree) -> tuple[jax.Array, None]:
        state = _layer_state(config.model)
        values = nnx.merge(_layer_graph(config.model), nnx.State(_with_values(state, layer)))
        return values(x, rotation, dropout_key=None), None

    return jax.lax.scan(one, x, params)[0]


def _with_values(state: nnx.State, values: PyTree) -> dict[Any, Any]:
    flat = dict(nnx.to_flat_state(state))
    found = {path: leaf.replace(_at(values, path)) for path, leaf in flat.items()}
    return nnx.traversals.unflatten_mapping(found)


def _at(tree: PyTree, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _microbatches(config: PipelineConfig, params: PyTree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, length = tokens.shape[0] // config.microbatches, tokens.shape[1] - 1
    tokens = tokens[: batch * config.microbatches].reshape(batch, config.microbatches, length + 1).swapaxes(0, 1)
    x = params["embedding"].astype(config.model.compute_dtype)[tokens[..., :-1]]
    return x, tokens[..., 1:]


def _cross_entropy(config: PipelineConfig, params: PyTree, x: jax.Array, targets: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.model.norm_epsilon)
    x = wide.astype(x.dtype) * params["norm"].astype(x.dtype)[None, None, None, :]
    logits = (x @ params["head"].astype(x.dtype)).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def _normal(key: jax.Array, shape: tuple[int, ...], model: LlamaConfig) -> jax.Array:
    return (0.02 * jax.random.truncated_normal(key, -3, 3, shape, jnp.float32)).astype(model.param_dtype)


@lru_cache(maxsize=8)
def _layer_state(model: LlamaConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Layer(model, rngs=nnx.Rngs(params=0))), nnx.Param)


@lru_cache(maxsize=8)
def _layer_graph(model: LlamaConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Layer(model, rngs=nnx.Rngs(params=0))))
