"""Settings of every test: 8 simulated CPU devices, strict promotion, nothing read from the user's home."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jax.sharding import Mesh

N_DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could set its devices: run pytest from the root of the "
        "repository and disable the plugin that imports jax (pytest --trace-config lists them)."
    )

# Variables, not jax.config: jax stays unimported until a test wants it, and processes that tests start inherit them.
os.environ.update(
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=f"--xla_force_host_platform_device_count={N_DEVICES}",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_ENABLE_X64="0",
    # Stores must see the credentials that a test gives them and no others.
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
    CLOUDSDK_CONFIG=os.devnull,
)
for name in (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "TENSORSTORE_GCS_HTTP_URL",
    "JAX_COMPILATION_CACHE_DIR",
):
    os.environ.pop(name, None)

settings.register_profile("untimed", deadline=None)  # a loaded machine fails no test
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_listener_stays() -> Iterator[None]:
    """What one test subscribes, or a manager that it never closes, is not heard by the next."""
    yield
    events = sys.modules.get("jaxckpt.core.events")
    if events is not None:
        events._replace(())


@pytest.fixture(scope="session")
def mesh_4x2() -> Mesh:
    """Four by two simulated devices, axes "data" and "model"."""
    import jax
    from jax.sharding import AxisType

    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
