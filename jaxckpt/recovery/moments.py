"""What becomes of a lost stage's leaves in the optimizer's state: which are made afresh, and of what."""

from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxckpt.core.tree import PyTree, flatten
from jaxckpt.recovery.plan import RecoveryPlan, StageStep

OPT_STATE = "opt_state"


def fresh_leaves(state: PyTree, plan: RecoveryPlan, tx: Any) -> dict[str, Any]:
    """Leaves of the optimizer that ``init`` makes whatever the weights are, such as zero moments."""
    params = state["params"] if isinstance(state, dict) else state.params
    program, shapes = jax.make_jaxpr(tx.init, return_shape=True)(params)
    made_by = {out: equation for equation in program.jaxpr.eqns for out in equation.outvars}
    varying = set(program.jaxpr.invars)
    for equation in program.jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in varying for x in equation.invars):
            varying.update(equation.outvars)

    def number(x: Any) -> Any:
        """What all elements are, where the program tells."""
        if isinstance(x, Literal):
            return x.val if np.ndim(x.val) == 0 else None
        equation = made_by.get(x)
        same = equation is not None and equation.primitive.name in ("broadcast_in_dim", "convert_element_type", "copy")
        return number(equation.invars[0]) if same and equation is not None else None

    # Wrapped, for None is no leaf of a tree.
    found = [(isinstance(x, Literal) or x not in varying, number(x)) for x in program.jaxpr.outvars]
    about = flatten(jax.tree.unflatten(jax.tree.structure(shapes), [_Constant(*each) for each in found]))[0]
    constants = {leaf.name: leaf.value for leaf in about}
    made = {}
    for leaf in flatten(tx.init(params))[0]:
        constant, value = constants[leaf.name]
        if constant:
            made[f"{OPT_STATE}.{leaf.name}"] = leaf.value if value is None else np.asarray(value, leaf.value.dtype)
    return made


def is_renewed(name: str, dtype: Any, step: StageStep, plan: RecoveryPlan, given: Collection[str]) -> bool:
    """Whether this leaf of the optimizer becomes fresh for the stage; ``given``: leaves that the stage's copy has."""
    mode = plan.policy.optimizer
    if step.source == "replica":
        return False
    if is_own(step.source) and name not in given:
        return True
    if mode in ("average", "keep"):
        return mode == "keep" and not is_own(step.source)
    if mode == "nu_average":
        return "nu" not in name.split(".") and bool(jnp.issubdtype(dtype, jnp.floating))
    return True


def is_own(source: str) -> bool:
    """Whether a source gives the stage what it had itself, exact or old."""
    return source in ("stale_copy", "same_step_copy", "checkpoint_stage")


class _Constant:
    """Whether a leaf is the same whatever the weights are, and the number that all its elements are, if one."""

    def __init__(self, constant: bool, value: Any) -> None:
        self.constant, self.value = constant, value

    def __iter__(self) -> Iterator[Any]:
        return iter((self.constant, self.value))
