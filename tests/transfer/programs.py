"""What the processes of the tests of captures do; run by run_processes, results as JSON."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.transfer.staging import STAGING


def make(data: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(data.shape, sharding, data.__getitem__)


def tree() -> dict[str, Any]:
    """Replicated leaves, of which each process writes a part, and sharded ones."""
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
    large = np.arange(1_500_000, dtype=np.float32).reshape(3000, 500)
    small = {f"s{k}": make(np.full((7, k + 1), k, np.float32), everywhere) for k in range(10)}
    return {"replicated": make(large, everywhere), "sharded": make(large[:2048], split), **small}


def save_in_all_modes(path: str) -> list[str]:
    """The states of a save in each mode, donated as soon as it is captured."""
    step = jax.jit(lambda state: jax.tree.map(lambda a: a * 0, state), donate_argnums=0)
    states = []
    for mode in ("auto", "pinned", "clone", "split"):
        state = tree()
        kept: Any = mode
        pending = jc.save_async(f"{path}/{mode}", state, capture=kept, timeout_s=30)
        jax.block_until_ready(step(state))
        pending.result(timeout_s=60)
        states.append(pending.state)
    (_, before) = jc.with_capture(step).capture(tree())
    pending = jc.save_async(f"{path}/in_step", before, timeout_s=30)
    pending.result(timeout_s=60)
    return [*states, pending.state]


def skip_when_one_is_busy(path: str) -> list[str]:
    """Process 0 has no room: all skip. Then it has, and all save."""
    if jax.process_index() == 0:
        STAGING.admit(10**9, 10**9, wait=True)
    budget = 10**9
    first = jc.save_async(f"{path}/a", tree(), when_busy="skip", host_budget_bytes=budget, timeout_s=30)
    if jax.process_index() == 0:
        STAGING.give_back(10**9)
    second = jc.save_async(f"{path}/b", tree(), when_busy="skip", host_budget_bytes=budget, timeout_s=30)
    for pending in (first, second):
        pending.result(timeout_s=60)
    return [first.state, second.state]
