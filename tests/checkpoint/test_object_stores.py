"""Whole checkpoints on S3 (SeaweedFS) and GCS (fake-gcs-server) over loopback, and in memory."""

import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.testing.servers import fake_gcs, seaweed_s3

Place = tuple[str, jc.StorageOptions | None]


@pytest.fixture(scope="module", params=["memory", "s3", "s3 by environment", "gs"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "memory":
        yield "memory://object-stores", None
        return
    with (fake_gcs if request.param == "gs" else seaweed_s3)() as server:
        by_environment = request.param != "s3"
        before = dict(os.environ)
        if by_environment:
            os.environ.update(server.env)
        try:
            yield f"{server.url.rstrip('/')}/{request.param[:2]}", None if by_environment else server.options
        finally:
            os.environ.clear()
            os.environ.update(before)


def tree(seed: int) -> dict[str, object]:
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    values = np.random.default_rng(seed).standard_normal((64, 32)).astype(np.float32)
    return {
        "w": jax.device_put(values, NamedSharding(mesh, P("d", "m"))),
        "b": jnp.arange(9, dtype=jnp.bfloat16),
        "zipped": np.arange(1000) + seed,
        "step": seed,
    }


def test_a_checkpoint_lives_on_an_object_store(place: Place) -> None:
    root, options = place
    path, first, second = f"{root}/run/1", tree(1), tree(2)
    jc.save(path, first, step=1, compression={"zipped": 3}, options=options)
    for like in (None, first, jc.on_host):
        found = jc.restore(path, like, options=options)
        assert all(np.array_equal(found[name], first[name]) for name in first)
    assert jc.inspect(path, options=options).step == 1
    assert jc.verify(path, options=options).ok
    assert set(jc.restore(path, only="b", options=options)) == {"b"}
    with pytest.raises(jc.AlreadyExistsError, match="overwrite=True"):
        jc.save(path, second, options=options)
    jc.save_async(path, second, overwrite=True, options=options).result(timeout_s=60)
    assert np.array_equal(jc.restore(path, options=options)["w"], second["w"])
    assert jc.verify(path, options=options).ok
    jc.save(f"{root}/run/2", first, options=options)
    assert {line.split(":")[0] for line in jc.diff(path, f"{root}/run/2", options=options).differing} >= {"w", "step"}
    with pytest.raises(jc.NotFoundError):
        jc.restore(f"{root}/run/3", options=options)
