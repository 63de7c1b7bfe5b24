"""For stage_recovery.py: a small LLaMA in stages, trained with a copy of each stage on the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.recovery.copies import NeighbourCopies, refresh_copies
from jaxckpt.recovery.layout import Stacked, StageLayout
from jaxckpt.recovery.norms import StageNorms, init_norms, update_norms
from jaxckpt.recovery.optimizer import scale_by_stage_lr, stage_optimizer
from models.llama import LlamaConfig
from models.pipeline import PipelineConfig, init_params, pipeline_loss
from models.presets import PIPELINE_PRESETS


class Run(NamedTuple):
    """All that a step changes."""

    state: dict[str, Any]  # "params" and "opt_state"
    norms: StageNorms  # of the gradients, per stage
    copies: NeighbourCopies  # of the stages' weights, each on the next stage


@dataclass(frozen=True)
class Trainer:
    """Process p of P holds stages p * S / P and on. Devices beyond one per stage are data parallel."""

    stages: int
    preset: str | None = None
    swap: bool = False
    copy_every: int = 5

    @cached_property
    def layout(self) -> StageLayout:
        return StageLayout(stages=self.stages, rules=(Stacked(pattern="stages"),), swap=self.swap)

    @cached_property
    def mesh(self) -> Mesh:
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        return Mesh(np.array(devices).reshape(self.stages, -1), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)

    @cached_property
    def config(self) -> PipelineConfig:
        tiny = LlamaConfig(embed=64, mlp=256, layers=self.stages, heads=4, kv_heads=4, tied=False)
        model = PIPELINE_PRESETS[self.preset].model if self.preset else tiny
        return PipelineConfig(model=model, stages=self.stages, microbatches=4, swap=self.swap)

    @cached_property
    def tx(self) -> Any:  # moments, a count and a learning rate for every stage
        each = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
        return optax.chain(stage_optimizer(each, self.layout), scale_by_stage_lr(self.layout))

    def make(self) -> Run:
        params = init_params(self.config, jax.random.key(0))
        copies = NeighbourCopies({"stages": params["stages"]}, jnp.int32(0))  # the first step takes them
        return Run({"params": params, "opt_state": self.tx.init(params)}, init_norms(self.layout), copies)

    @cached_property
    def abstract(self) -> Run:
        """Shapes and shardings: what belongs to a stage lies over "stage", all else is everywhere."""

        def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            staged = name.startswith("norms") or self.layout.placement(name).kind == "stacked"
            return x.update(sharding=NamedSharding(self.mesh, P("stage") if staged else P()))

        return jax.tree_util.tree_map_with_path(one, jax.eval_shape(self.make))

    def begin(self) -> Run:
        return jax.jit(self.make, out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract))()

    @cached_property
    def step(self) -> Any:  # (run, tokens, steps done) -> (run, loss); the run is donated
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, NamedSharding(self.mesh, P())))

    def _step(self, run: Run, tokens: jax.Array, done: jax.Array) -> tuple[Run, jax.Array]:
        params = run.state["params"]
        tokens = jax.lax.with_sharding_constraint(tokens, NamedSharding(self.mesh, P("data")))
        loss, grads = jax.value_and_grad(partial(pipeline_loss, self.config, self.mesh))(params, tokens)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.tx.update(grads, run.state["opt_state"], params)
            new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        weights = {"stages": new["params"]["stages"]}
        copies = refresh_copies(run.copies, weights, done + 1, self.layout, self.mesh, every=self.copy_every)
        return Run(new, update_norms(run.norms, grads, self.layout), copies), loss

    @cached_property
    def loss(self) -> Any:  # (parameters, tokens) -> loss
        return jax.jit(partial(pipeline_loss, self.config, self.mesh))
