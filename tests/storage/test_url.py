"""Which store a path or URL means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.storage.kv import KvStore
from jaxckpt.storage.local import LocalStore
from jaxckpt.storage.url import StorageOptions, open_store

ENDPOINT = "http://127.0.0.1:9"  # nobody listens: opening a store contacts nobody


@pytest.fixture(autouse=True)
def _no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    # Put back afterwards what open_store itself sets.
    for name in ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("/tmp/run", "/tmp/run"),
        ("/tmp/run/", "/tmp/run"),
        ("/tmp//run/../other", "/tmp/other"),
        ("/tmp/100% a#b?c", "/tmp/100% a#b?c"),
        ("file:///tmp/run", "/tmp/run"),
        ("file:///tmp/run/", "/tmp/run"),
        ("file://localhost/tmp/run", "/tmp/run"),
        ("FILE:///tmp/run", "/tmp/run"),
        ("file:///tmp/a%20b%25", "/tmp/a b%"),
        ("file:///tmp/a b#c?d", "/tmp/a b#c?d"),
        ("file:///", "/"),
        (Path("/tmp/run"), "/tmp/run"),
        ("s3:/bucket", None),
        ("run", None),
        ("~", None),
    ],
)
def test_paths_and_file_urls_are_folders(text: str | Path, root: str | None) -> None:
    store = open_store(text)
    assert isinstance(store, LocalStore)
    assert store.root == (root or os.path.abspath(text))


@pytest.mark.parametrize(
    ("root", "url"),
    [
        ("/", "file:///"),
        ("/tmp/run", "file:///tmp/run/"),
        ("/tmp/a b%#?", "file:///tmp/a%20b%25%23%3F/"),
        ("/tmp/ü", "file:///tmp/%C3%BC/"),
    ],
)
def test_the_url_of_a_folder_leads_back_to_it(root: str, url: str) -> None:
    store = open_store(root)
    assert store.url == url
    assert open_store(url).kvstore_spec() == store.kvstore_spec()


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_any_name_of_a_folder_survives_its_url(name: str) -> None:
    store = LocalStore(f"/tmp/{name}")
    assert open_store(store.url).kvstore_spec() == store.kvstore_spec()


def test_opening_makes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a/b")
    assert store.names() == []
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "url", "spec"),
    [
        ("s3://bucket", "s3://bucket/", {"driver": "s3", "bucket": "bucket", "path": ""}),
        ("s3://bucket/", "s3://bucket/", {"driver": "s3", "bucket": "bucket", "path": ""}),
        ("s3://bucket/a/b/", "s3://bucket/a/b/", {"driver": "s3", "bucket": "bucket", "path": "a/b/"}),
        ("S3://bucket/a%20b", "s3://bucket/a%20b/", {"driver": "s3", "bucket": "bucket", "path": "a%20b/"}),
        ("s3://bucket/a#1?x=2", "s3://bucket/a#1?x=2/", {"driver": "s3", "bucket": "bucket", "path": "a#1?x=2/"}),
        ("gs://bucket/run", "gs://bucket/run/", {"driver": "gcs", "bucket": "bucket", "path": "run/"}),
        ("gs://bucket/a b#1", "gs://bucket/a b#1/", {"driver": "gcs", "bucket": "bucket", "path": "a b#1/"}),
        ("memory://", "memory://", {"driver": "memory", "path": ""}),
        ("memory://run", "memory://run/", {"driver": "memory", "path": "run/"}),
        ("memory:///run/5/", "memory://run/5/", {"driver": "memory", "path": "run/5/"}),
    ],
)
def test_urls_are_buckets_and_keys(text: str, url: str, spec: dict[str, object]) -> None:
    store = open_store(text, StorageOptions(anonymous=True, region="eu-west-1"))
    assert isinstance(store, KvStore)
    assert store.url == url
    assert {key: store.kvstore_spec()[key] for key in spec} == spec
    child = store.child("x")
    assert child.url == f"{url}x/"
    assert child.kvstore_spec()["path"] == f"{spec['path']}x/"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "non-empty"),
        (b"/tmp/run", "non-empty"),
        ("s3://", "no bucket"),
        ("gs:///run", "no bucket"),
        ("file://host/run", "'host'"),
        ("hdfs://host/run", "'hdfs'.* known are file://, gs://, s3://, memory://"),
    ],
)
def test_what_is_no_place_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        open_store(text)


def test_s3_is_where_the_options_say() -> None:
    options = StorageOptions(endpoint=f"{ENDPOINT}/", region="eu-west-1", anonymous=True)
    spec = open_store("s3://bucket/run", options).kvstore_spec()
    assert spec["endpoint"] == ENDPOINT
    assert spec["aws_region"] == "eu-west-1"
    assert spec["aws_credentials"] == {"type": "anonymous"}


def test_s3_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ENDPOINT)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    spec = open_store("s3://bucket/run").kvstore_spec()
    assert spec["endpoint"] == ENDPOINT
    assert spec["aws_region"] == "eu-west-1"
    assert "aws_credentials" not in spec


def test_no_secret_is_in_what_may_be_printed() -> None:
    options = StorageOptions(endpoint=ENDPOINT, access_key_id="key", secret_access_key="s3cr3t", session_token="t0ken")
    store = open_store("s3://bucket/run", options)
    assert "s3cr3t" not in f"{store.kvstore_spec()} {store.url} {options}"
    assert "t0ken" not in f"{store.kvstore_spec()} {store.url} {options}"


@pytest.mark.parametrize("half", [{"access_key_id": "key"}, {"secret_access_key": "secret"}])
def test_half_a_key_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="needs both"):
        open_store("s3://bucket/run", StorageOptions(endpoint=ENDPOINT, **half))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "127.0.0.1:9", "http://127.0.0.1:9/"])
def test_gcs_is_where_the_options_say(endpoint: str) -> None:
    open_store("gs://bucket/run", StorageOptions(endpoint=endpoint))
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "http://127.0.0.1:9"
    assert "GOOGLE_AUTH_TOKEN_FOR_TESTING" not in os.environ


def test_gcs_is_where_the_emulator_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    open_store("gs://bucket/run")
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "http://127.0.0.1:9"
    assert os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"]


def test_gcs_cannot_be_in_two_places() -> None:
    open_store("gs://bucket/run", StorageOptions(endpoint="http://127.0.0.1:9"))
    with pytest.raises(InvalidArgumentError, match="127.0.0.1:9.*127.0.0.1:8"):
        open_store("gs://bucket/run", StorageOptions(endpoint="http://127.0.0.1:8"))
    open_store("gs://bucket/other", StorageOptions(endpoint="http://127.0.0.1:9"))


@pytest.mark.parametrize("before", ["", "127.0.0.1:9", "http://127.0.0.1:9/"])
def test_gcs_is_where_the_variable_says_however_it_is_written(monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", before)
    open_store("gs://bucket/run", StorageOptions(endpoint="http://127.0.0.1:9"))
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"].rstrip("/") == "http://127.0.0.1:9"


def test_only_an_emulator_is_asked_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:8")
    open_store("gs://bucket/run", StorageOptions(endpoint="http://127.0.0.1:9"))
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "http://127.0.0.1:9"
    assert "GOOGLE_AUTH_TOKEN_FOR_TESTING" not in os.environ
