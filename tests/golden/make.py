"""How the golden folders were made: one checkpoint per version of the format, which every later release must read.

JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m tests.golden.make FOLDER

Run it in the root of the repository; FOLDER must not exist. v1 was made with jaxckpt 0.1.0, jax 0.10.2.
The content follows from arithmetic alone. A folder that is in the repository is never made again: a new version of the
format gets a folder beside it, made by the release that writes it, and `tree` keeps what the older ones hold.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxckpt as jc

STEP = 1234
METADATA = {"run": "golden", "numbers": [1, 2.5, None, True]}
DTYPES = (
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
    "uint64", "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float4_e2m1fn",
    "float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
ON_DEVICE = tuple(name for name in DTYPES if name not in ("int64", "uint64", "float64", "complex128"))


class Moments(NamedTuple):
    mean: Any
    square: Any


def tree() -> dict[Any, Any]:
    """What the golden folders hold; arrays lie on the first 8 devices."""
    devices = jax.devices()[:8]
    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=devices)
    first = SingleDeviceSharding(devices[0])

    def placed(values: np.ndarray, *spec: Any) -> jax.Array:
        return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))

    tied = placed(bits("float32", (16, 8), 1), "model", None)
    return {
        "jax": {name: jax.device_put(bits(name, (3, 5), i), first) for i, name in enumerate(ON_DEVICE)},
        "numpy": {name: bits(name, (2, 3), 50 + i) for i, name in enumerate(DTYPES)},
        "numpy_scalar": np.float32(-0.0),
        "sharded": placed(bits("bfloat16", (64, 32), 2), "data", "model"),
        "sharded_on_two_axes": placed(bits("float32", (64,), 3), ("data", "model")),
        "replicated": placed(bits("float32", (7,), 4)),
        "zstd": placed(np.tile(bits("int32", (8, 16), 5), (128, 48)), "data", None),  # 3 MiB: several chunks
        "empty": placed(np.zeros((0, 4), np.float32)),
        "scalar": jax.device_put(jnp.asarray(3.5, jnp.bfloat16), first),
        "keys": {
            "threefry": key((2,), "threefry2x32", (2, 2)),
            "rbg": key((), "rbg", (4,)),
        },
        "tied": {"embedding": tied, "head": tied},
        "by_number": {0: bits("float32", (2,), 6), 10: bits("float32", (2,), 7), -1: bits("float32", (2,), 8)},
        "mixed": {1: 1, "1": 2, "a.b": 3, "a/b": 4, "ü": 5},
        "moments": Moments(mean=bits("float32", (2, 2), 9), square=[bits("float32", (1,), 10), None]),
        "plain": (7, -(2**100), True, 0.1, float("-inf"), 1 - 2j, "text ☃", b"\x00\xff bytes", None),
        "nothing": {"dict": {}, "list": [], "tuple": ()},
    }


def bits(dtype: str, shape: tuple[int, ...], salt: int) -> np.ndarray:
    """Bytes of a linear congruence, as values that the dtype has."""
    kind = jnp.dtype(dtype)
    size = int(np.prod(shape))
    data = ((np.arange(size * kind.itemsize, dtype=np.int64) * 73 + 31 * salt + 17) % 251).astype(np.uint8)
    if dtype == "bool":
        data &= 1
    if dtype == "float4_e2m1fn":
        data &= 15
    if dtype in ("int2", "uint2", "int4", "uint4"):
        count = 1 << int(dtype[-1])
        low = 0 if dtype.startswith("u") else -count // 2
        return (data % count + np.int8(low)).astype(np.int8).astype(kind).reshape(shape)
    return data.view(kind).reshape(shape)


def key(shape: tuple[int, ...], impl: str, data_shape: tuple[int, ...]) -> jax.Array:
    found = jax.random.wrap_key_data(jnp.asarray(bits("uint32", data_shape, 11)), impl=impl)
    assert found.shape == shape
    return found


def main() -> None:
    path = Path(sys.argv[1])
    jc.save(path, tree(), step=STEP, metadata=METADATA, compression={"zstd": 9})
    print(f"{path}: {sum(file.stat().st_size for file in path.rglob('*') if file.is_file()):,} bytes")


if __name__ == "__main__":
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        sys.exit("Run it as JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m tests.golden.make FOLDER")
    main()
