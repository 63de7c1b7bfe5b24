"""Paths and URLs -> stores: file://, gs://, s3://, memory://, and plain paths."""

import atexit
import functools
import os
import tempfile
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.storage.kv import KvStore
from jaxckpt.storage.local import LocalStore
from jaxckpt.storage.store import AbstractStore

SCHEMES = ("file://", "gs://", "s3://", "memory://")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """Where and as whom to reach an object store. What is not given comes from the usual environment variables.

    S3: ``endpoint`` (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL), ``region`` (AWS_REGION, AWS_DEFAULT_REGION),
    ``access_key_id``, ``secret_access_key``, ``session_token`` (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN), ``profile`` (AWS_PROFILE), ``anonymous``.
    GCS: the credentials of the machine (GOOGLE_APPLICATION_CREDENTIALS), and ``endpoint`` or STORAGE_EMULATOR_HOST or
    TENSORSTORE_GCS_HTTP_URL for an emulator.
    """

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    profile: str | None = None
    anonymous: bool = False


def open_store(path: str | os.PathLike[str], options: StorageOptions | None = None) -> AbstractStore:
    """The store of a path or URL. Nothing is created or contacted yet.

    Example:
        >>> open_store("/tmp/run/5").url
        'file:///tmp/run/5/'
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"A checkpoint path is a non-empty string or os.PathLike, not {path!r}.")
    options = options or StorageOptions()
    if "://" not in text:
        return LocalStore(text)
    parts = urlsplit(text)
    key = (parts.path.strip("/") + "/").lstrip("/")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InvalidArgumentError(f"{text!r} names the host {parts.netloc!r}; a local file URL is file:///path.")
        return LocalStore(unquote(parts.path))
    if parts.scheme == "memory":
        key = f"{parts.netloc}/{key}".strip("/") + "/"
        return KvStore(f"memory://{key}", {"driver": "memory", "path": key}, parallel_io=2)
    if parts.scheme in ("s3", "gs") and not parts.netloc:
        raise InvalidArgumentError(f"{text!r} names no bucket; write {parts.scheme}://bucket/path.")
    if parts.scheme == "s3":
        return KvStore(f"s3://{parts.netloc}/{key}", _s3(parts.netloc, key, options))
    if parts.scheme == "gs":
        return KvStore(f"gs://{parts.netloc}/{key}", _gcs(parts.netloc, key, options))
    raise InvalidArgumentError(
        f"{text!r} has an unknown scheme {parts.scheme!r}; known are {', '.join(SCHEMES)} and plain paths."
    )


def _s3(bucket: str, key: str, options: StorageOptions) -> dict[str, object]:
    spec: dict[str, object] = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"  # TensorStore asks for one with an endpoint of one's own
    if region:
        spec["aws_region"] = region
    if options.anonymous:
        spec["aws_credentials"] = {"type": "anonymous"}
    elif options.access_key_id and options.secret_access_key:
        keys = (options.access_key_id, options.secret_access_key, options.session_token or "")
        path = _credentials_file(*keys)
        spec["aws_credentials"] = {"type": "profile", "profile": "default", "credentials_file": path, "config_file": path}
    elif options.profile:
        spec["aws_credentials"] = {"type": "profile", "profile": options.profile}
    return spec


@functools.cache
def _credentials_file(access_key_id: str, secret_access_key: str, session_token: str) -> str:
    """Keys as the file of a profile, the only form in which TensorStore takes them from a caller.

    TensorStore reads it whenever a store is opened, so it lasts as long as the process: in memory where the system can.
    """
    lines = ["[default]", f"aws_access_key_id = {access_key_id}", f"aws_secret_access_key = {secret_access_key}"]
    lines += [f"aws_session_token = {session_token}"] if session_token else []
    data = "\n".join([*lines, ""]).encode()
    if hasattr(os, "memfd_create"):
        fd, path = os.memfd_create("aws-credentials"), "/proc/self/fd/{}"
    else:
        fd, path = tempfile.mkstemp(prefix="jaxckpt-")  # readable by the user alone
        atexit.register(os.unlink, path)
    os.write(fd, data)
    return path.format(fd)


def _gcs(bucket: str, key: str, options: StorageOptions) -> dict[str, object]:
    endpoint = options.endpoint or os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        # TensorStore's gcs driver takes an endpoint from this variable alone.
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", endpoint if "://" in endpoint else f"http://{endpoint}")
    return {"driver": "gcs", "bucket": bucket, "path": key}
