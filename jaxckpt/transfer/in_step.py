"""A second variant of a training step that also returns the old state, on its way to the host, for steps that save.

XLA schedules the transfers beside the step's own work, and the state can be donated all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.transfer.send import is_on_host


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """A state as it was before a step, for ``save_async``. Let go of it then: it holds host memory.

    ``tree`` has the structure of the state; ``shardings`` tells by ``id`` of its leaves where they lay.
    """

    tree: Any
    shardings: dict[int, Sharding]


@final
class CapturingStep:
    """A step function, and its variant that captures; see ``with_capture``."""

    def __init__(self, step: Callable[..., Any], state: int, options: dict[str, Any]) -> None:
        self._step, self._state = step, state
        self._plain: Any = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=state, **options)
        self._variants: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The step as it was given."""
        return self._plain(*args, **kwargs)

    def capture(self, *args: Any, **kwargs: Any) -> tuple[Any, Snapshot]:
        """(what the step returns, a snapshot of the state that it was given). The state is donated."""
        if not self._state < len(args):
            raise InvalidArgumentError(
                f"with_capture(state={self._state}) takes the state from positional argument {self._state}, and the "
                f"step was called with {len(args)} of them: pass the state by position."
            )
        leaves, structure = jax.tree.flatten(args[self._state])
        homes = tuple([leaf.sharding if isinstance(leaf, jax.Array) else None for leaf in leaves])
        key = (structure, homes, tuple([_moves(leaf) for leaf in leaves]))
        if key not in self._variants:
            # Without its outputs' shardings XLA may give a donated buffer to an output that belongs in host memory. The
            # step has been compiled by now, or will be soon, so asking for them costs nothing.
            outs = self._plain.lower(*args, **kwargs).compile().output_shardings
            self._variants[key] = self._compile(homes, key[2], outs)
        out, old = self._variants[key](*args, **kwargs)
        kept = [leaf if home is None else copy for leaf, home, copy in zip(leaves, homes, old, strict=True)]
        lay = {id(copy): home for copy, home in zip(old, homes, strict=True) if home is not None}
        return out, Snapshot(tree=jax.tree.unflatten(structure, kept), shardings=lay)

    def _compile(self, homes: tuple[Sharding | None, ...], moves: tuple[bool, ...], outs: Any) -> Callable[..., Any]:
        targets = [
            home.with_memory_kind("pinned_host") if home is not None and moved else home
            for home, moved in zip(homes, moves, strict=True)
        ]

        def variant(*args: Any, **kwargs: Any) -> Any:
            old = jax.tree.leaves(args[self._state])
            return self._plain(*args, **kwargs), [
                None if home is None else leaf if moved else jnp.copy(leaf)
                for leaf, home, moved in zip(old, homes, moves, strict=True)
            ]

        return jax.jit(variant, donate_argnums=self._state, out_shardings=(outs, targets))


def with_capture(step: Callable[..., Any], *, state: int = 0, **options: Any) -> CapturingStep:
    """Give a fused training step, which donates its state, a variant that captures the state too.

    The variant is compiled when it is first called, and used on steps that save only.

    Args:
        step: a function, or one that ``jax.jit`` has wrapped already.
        state: position of the argument that is saved and donated.
        options: for ``jax.jit``, where ``step`` is not wrapped.

    Example:
        >>> import jax.numpy as jnp, jaxckpt as jc
        >>> step = jc.with_capture(lambda state, x: (jax.tree.map(lambda a: a + x, state), x * 2))
        >>> (state, loss), before = step.capture({"w": jnp.zeros(3)}, 1.0)  # steps that save
        >>> pending = jc.save_async("memory://docs/in_step", before)
        >>> state, loss = step(state, 1.0)  # all others
        >>> pending.result(timeout_s=60)
        >>> jc.restore("memory://docs/in_step")["w"].tolist()
        [0.0, 0.0, 0.0]
    """
    return CapturingStep(step, state, options)


def _moves(leaf: Any) -> bool:
    """Whether a leaf goes to host memory: keys have a layout of their own, and are small."""
    if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    return not is_on_host(leaf)
