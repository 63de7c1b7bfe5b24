"""Real servers, started once and only where a test asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("jaxckpt.testing.store_suite")

from jaxckpt.testing.servers import Server, fake_gcs, seaweed_s3  # noqa: E402 - after the rewriting is asked for

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    with seaweed_s3() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Server]:
    with fake_gcs() as server:
        yield server
