"""Averages that are kept while training (EMA, SWA, post-hoc EMA): their memory, their rates, their leaves."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.averaging import ema, posthoc, swa

ONLINE = {
    "ema": (ema.init, lambda state, params: ema.update(state, params, decay=0.9)),
    "debiased": (lambda params: ema.init(params, debias=True), lambda s, params: ema.update(s, params, decay=0.9)),
    "swa": (swa.init, swa.update),
    "posthoc": (posthoc.init, posthoc.update),
}


def leaves() -> dict[str, Any]:
    return {
        "w": jnp.ones(3),
        "half": jnp.ones(2, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "steps": jnp.int32(2),
        "key": jax.random.key(0),
    }


def test_the_modules_that_the_guide_names_are_there() -> None:
    names = "averaging.ema.init, averaging.swa.init, averaging.posthoc.init, averaging.batch_norm.reestimate"
    # In a process where nobody has imported them.
    done = subprocess.run([sys.executable, "-c", f"from jaxckpt import averaging; {names}"], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("jit", [False, True])
def test_weights_may_be_donated_after_init_and_after_update(name: str, jit: bool) -> None:
    init, update = (jax.jit(one) if jit else one for one in ONLINE[name])
    params = leaves()
    state = init(params)
    for _ in range(2):
        train = jax.jit(lambda p: {k: v if k == "key" else v * 2 for k, v in p.items()}, donate_argnums=0)
        params = train(params)
        state = update(state, params)
    delete(params)
    jax.block_until_ready(jax.tree.map(jnp.copy, state))


@pytest.mark.parametrize("name", ONLINE)
def test_states_may_be_donated_from_the_first_update_on(name: str) -> None:
    init, update = ONLINE[name]
    params, step = leaves(), jax.jit(update, donate_argnums=0)
    state = init(params)
    for _ in range(3):
        state = step(state, params)
    delete(state)
    jax.block_until_ready(jax.tree.map(jnp.copy, params))


def delete(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


@pytest.mark.parametrize("name", ONLINE)
def test_numpy_weights_may_be_written_over(name: str) -> None:
    init, update = ONLINE[name]
    params = {"w": np.ones(1024, np.float32)}
    states = [init(params)]
    states.append(update(states[0], params))
    before = jax.tree.map(np.array, states)
    params["w"][:] = 7
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(states), strict=True):
        assert (old == np.asarray(new)).all()


@pytest.mark.parametrize("decay", [0.9, 0.9999, 0.99999, 0.999999, np.float64(0.999999)])
@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("debias", [False, True])
def test_the_rate_of_an_ema_is_right_for_long_ones(decay: float, warm_up: bool, debias: bool) -> None:
    values = np.random.default_rng(0).uniform(1, 2, 200)
    average, weight = 0.0, 0.0 if debias else 1.0
    state = ema.init({"w": jnp.float32(0)}, debias=debias)
    step = jax.jit(lambda s, x: ema.update(s, {"w": x}, decay=decay, warm_up=warm_up))
    for n, x in enumerate(values):
        rate = 1 - (min(decay, (1 + n) / (10 + n)) if warm_up else decay)
        average, weight = average + rate * (x - average), weight + rate * (1 - weight)
        state = step(state, jnp.float32(x))
    assert float(state.average["w"]) == pytest.approx(average, rel=3e-6)
    assert float(state.weight) == pytest.approx(weight, rel=3e-6)
    assert float(ema.value(state)["w"]) == pytest.approx(average / weight, rel=3e-6)


def test_a_traced_decay_is_that_number() -> None:
    state = ema.init({"w": jnp.float32(0)})
    found = jax.jit(lambda s, d: ema.update(s, {"w": jnp.float32(1)}, decay=d))(state, jnp.float32(0.75))
    assert float(found.average["w"]) == 0.25
    with pytest.raises(jc.CheckpointError, match=r"decay is 1\.5"):
        ema.update(state, {"w": jnp.float32(1)}, decay=np.float32(1.5))


@pytest.mark.parametrize("module", [ema, swa])
def test_a_value_has_the_dtypes_of_like_and_keys_as_they_are(module: Any) -> None:
    params = {**leaves(), "count": 3, "scale": 0.5}
    state = ONLINE[module.__name__.rpartition(".")[2]][1](module.init(params), params)
    found = module.value(state, like=params)
    assert found["half"].dtype == jnp.bfloat16
    assert found["complex"].dtype == jnp.complex64
    assert found["steps"].dtype == found["count"].dtype == jnp.int32
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(params["key"])).all()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    assert module.value(state, like=shapes)["half"].dtype == jnp.bfloat16
    assert module.value(state)["half"].dtype == jnp.float32


def test_narrow_numpy_weights_are_averaged_in_float32() -> None:
    state = swa.init({"w": np.ones(2, ml_dtypes.bfloat16)})
    state = swa.update(state, {"w": np.full(2, 3, ml_dtypes.bfloat16)})
    assert state.mean["w"].dtype == jnp.float32
