"""Every store passes the one suite: folders, memory, S3 as SeaweedFS speaks it, GCS as fake-gcs-server does."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from jaxckpt.storage.url import open_store
from jaxckpt.testing.store_suite import StoreSuite
from jaxckpt.testing.stores import CountingStore

if TYPE_CHECKING:
    from pathlib import Path

    from jaxckpt.storage.store import AbstractStore
    from jaxckpt.testing.servers import Server


class TestLocalStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> AbstractStore:
        return open_store(tmp_path / "not" / "made yet")


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def store(self) -> AbstractStore:
        return open_store(f"memory://{uuid4().hex}")


class TestS3Store(StoreSuite):
    @pytest.fixture
    def store(self, s3_server: Server) -> AbstractStore:
        return open_store(f"{s3_server.url}{uuid4().hex}", s3_server.options)


class TestGcsStore(StoreSuite):
    @pytest.fixture
    def store(self, gcs_server: Server) -> AbstractStore:
        return open_store(f"{gcs_server.url}{uuid4().hex}", gcs_server.options)


class TestWrappedStore(StoreSuite):
    """What wraps a store is a store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> AbstractStore:
        return CountingStore(open_store(tmp_path / "root"))
