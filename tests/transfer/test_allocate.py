import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.transfer import upload
from jaxckpt.transfer.allocate import can_allocate, uninitialised


def meshes():
    auto = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    explicit = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    return auto, explicit


def shardings():
    for mesh in meshes():
        for spec in (P("a", "b"), P(("a", "b")), P(None, "b"), P("b"), P()):
            yield NamedSharding(mesh, spec)
    yield SingleDeviceSharding(jax.devices()[3])


@pytest.mark.parametrize("sharding", list(shardings()), ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_arrays_have_the_shape_dtype_and_sharding_asked_for(sharding, dtype):
    dtype = np.dtype(dtype)
    array, other = uninitialised([((16, 24), dtype, sharding), ((8, 8, 3), dtype, sharding)])
    assert (array.shape, array.dtype, array.sharding) == ((16, 24), dtype, sharding)
    assert (other.shape, other.dtype, other.sharding) == ((8, 8, 3), dtype, sharding)


def test_no_two_shards_share_memory():
    wanted = [((64, 64), np.dtype(np.float32), sharding) for sharding in shardings()]
    places = [
        (shard.data.unsafe_buffer_pointer(), shard.data.nbytes)
        for array in uninitialised(wanted)
        for shard in array.addressable_shards
    ]
    places.sort()
    assert all(a + size <= b for (a, size), (b, _) in zip(places, places[1:], strict=False))


def test_the_memory_is_reused_on_donation():
    sharding = SingleDeviceSharding(jax.devices()[0])
    (array,) = uninitialised([((1024, 1024), np.dtype(np.float32), sharding)])
    place = array.unsafe_buffer_pointer()
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(array).unsafe_buffer_pointer() == place


def test_uneven_and_packed_arrays_are_not_for_it():
    mesh, _ = meshes()
    assert not can_allocate((6, 4), np.dtype(np.float32), NamedSharding(mesh, P("a")))
    assert not can_allocate((8, 4), np.dtype(ml_dtypes.int4), NamedSharding(mesh, P("a")))
    assert can_allocate((8, 4), np.dtype(np.float32), NamedSharding(mesh, P("a")))


def test_a_large_tree_is_restored_into_such_arrays_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "UNINITIALISED_BYTES", 0)
    random = np.random.default_rng(0)
    mesh, _ = meshes()
    tree = {
        str(sharding): jax.device_put(random.standard_normal((512, 1024), dtype=np.float32), sharding)
        for sharding in shardings()
    }
    jc.save(tmp_path / "c", tree)
    found = jc.restore(tmp_path / "c", tree)
    for name, array in tree.items():
        assert found[name].sharding == array.sharding
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array))
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    for name, array in found.items():
        np.testing.assert_array_equal(np.asarray(double(array)), 2 * np.asarray(tree[name]))
