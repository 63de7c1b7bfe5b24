"""A model in stages that the recovery studies train, lose stages of, and recover: one device, stacked stages."""

# ruff: noqa: E402, TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

if "--tiny" in sys.argv:  # compiling is most of it
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh

from jaxckpt.recovery.copies import init_copies
from jaxckpt.recovery.layout import Stacked, StageLayout
from jaxckpt.recovery.norms import StageNorms, init_norms, update_norms
from jaxckpt.recovery.optimizer import scale_by_stage_lr, stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.recover import recover_stage
from models.llama import LlamaConfig  # noqa: TC001
from models.pipeline import PipelineConfig, init_params, sequential_loss
from models.text import eval_batch, train_batch

PyTree = Any


class Run(NamedTuple):
    """All that a step changes."""

    state: dict[str, Any]  # "params" and "opt_state"
    norms: StageNorms


@dataclass(frozen=True)
class Study:
    """A model, its stages, and how it is trained. Adam at a constant rate, as in the paper."""

    model: LlamaConfig
    stages: int
    batch: int
    length: int
    rate: float
    swap: bool = False
    clip: float = 1.0
    held_out: int = 64  # passages

    @cached_property
    def layout(self) -> StageLayout:
        return StageLayout(stages=self.stages, rules=(Stacked(pattern="stages", layers_axis=1),), swap=self.swap)

    @cached_property
    def mesh(self) -> Mesh:
        return jax.make_mesh((1,), ("stage",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    @cached_property
    def config(self) -> PipelineConfig:
        microbatches = 2 if self.swap else 1
        return PipelineConfig(model=self.model, stages=self.stages, microbatches=microbatches, swap=self.swap)

    @cached_property
    def tx(self) -> Any:
        each = optax.chain(optax.clip_by_global_norm(self.clip), optax.adam(self.rate))
        return optax.chain(stage_optimizer(each, self.layout), scale_by_stage_lr(self.layout))

    def begin(self, seed: int = 0) -> Run:
        def make(key: jax.Array) -> Run:
            params = init_params(self.config, key)
            return Run({"params": params, "opt_state": self.tx.init(params)}, init_norms(self.layout))

        return jax.jit(make)(jax.random.key(seed))

    @cached_property
    def step(self) -> Callable[[Run, jax.Array], tuple[Run, jax.Array]]:
        """(run, tokens) -> (run, loss). Nothing is donated: a fork keeps where it began."""

        def step(run: Run, tokens: jax.Array) -> tuple[Run, jax.Array]:
            params = run.state["params"]
            loss, grads = jax.value_and_grad(partial(sequential_loss, self.config))(params, tokens)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = self.tx.update(grads, run.state["opt_state"], params)
                new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
            return Run(new, update_norms(run.norms, grads, self.layout, clip=self.clip)), loss

        return jax.jit(step)

    def train(self, run: Run, steps: range, *, seed: int = 0) -> Run:
        """Step ``s`` sees the same passages in every run of one seed."""
        for s in steps:
            run, _ = self.step(run, train_batch(seed=seed, step=s, batch=self.batch, length=self.length))
        return run

    @cached_property
    def _evaluate(self) -> Callable[[PyTree], jax.Array]:
        # In plain order, whatever the training did: that is how the model would be used.
        config = replace(self.config, microbatches=1, swap=False)
        tokens = jnp.asarray(eval_batch(batch=self.held_out, length=self.length))
        return jax.jit(lambda params: sequential_loss(config, params, tokens))

    def loss(self, run: Run) -> float:
        """On held-out text, nats per byte."""
        return float(self._evaluate(run.state["params"]))

    def lose(self, run: Run, stage: int) -> Run:
        """All that the stage held is NaN (and its counts a large number), so that what is read of it shows."""

        def gone(leaf: jax.Array) -> jax.Array:
            if leaf.ndim == 0 or leaf.shape[0] != self.stages:
                return leaf
            bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 1 << 20
            return leaf.at[stage].set(jnp.asarray(bad, leaf.dtype))

        state = jax.tree.map(lambda leaf: leaf.copy(), run.state)
        state = {
            "params": state["params"] | {"stages": jax.tree.map(gone, state["params"]["stages"])},
            "opt_state": jax.tree.map(gone, state["opt_state"]),
        }
        return Run(state, StageNorms(*map(gone, run.norms)))

    def recover(
        self,
        run: Run,
        stage: int,
        *,
        source: str,
        policy: RecoveryPolicy,
        old: PyTree = None,
        age: int = 0,
        seed: int = 0,
    ) -> Run:
        """The stage lost and brought back by ``recover_stage``. ``old``: an earlier state, what copies hold."""
        available = Available(copies={} if old is None else dict.fromkeys(range(self.stages), age))
        plan = plan_recovery(stage, self.layout, available, policy=policy, source=source)
        fresh = partial(init_params, self.config, jax.random.key(1000 + seed))
        lost = self.lose(run, stage)
        copies = None if old is None else init_copies(_staged(old), self.layout, self.mesh).values
        state = recover_stage(
            lost.state,
            plan,
            self.mesh,
            norms=lost.norms.clipped,
            copies=copies,
            tx=self.tx,
            init=fresh if policy.method == "random" else None,
        )
        return Run(state, lost.norms)


def _staged(state: PyTree) -> PyTree:
    """Of a state, what the pipeline's stages hold; the optimizer's only where it is there."""
    found = {"params": {"stages": state["params"]["stages"]}}
    if "opt_state" in state:
        found["opt_state"] = {"0": {"stacked_stages": state["opt_state"][0].stacked_stages}}
    return found
