"""Paths and URLs -> stores: file://, gs://, s3://, memory://, and plain paths."""

import atexit
import functools
import os
import tempfile
from dataclasses import dataclass, field
from urllib.parse import unquote

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.storage.kv import KvStore
from jaxckpt.storage.local import LocalStore
from jaxckpt.storage.store import AbstractStore

_GCS_URL = "TENSORSTORE_GCS_HTTP_URL"
SCHEMES = ("file://", "gs://", "s3://", "memory://")


Location = str | os.PathLike[str] | AbstractStore  # a store: for authors of stores, and tests


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """Where and as whom to reach an object store. What is not given comes from the usual environment variables.

    S3: ``endpoint`` (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL), ``region`` (AWS_REGION, AWS_DEFAULT_REGION),
    ``access_key_id``, ``secret_access_key``, ``session_token`` (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN), ``profile`` (AWS_PROFILE), ``anonymous``.
    GCS: the credentials of the machine (GOOGLE_APPLICATION_CREDENTIALS), and ``endpoint`` (TENSORSTORE_GCS_HTTP_URL,
    STORAGE_EMULATOR_HOST) for an emulator, one per process; ``anonymous`` for one that asks for no credentials.
    """

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    anonymous: bool = False


def open_store(path: Location, options: StorageOptions | None = None) -> AbstractStore:
    """The store of a path or URL, or a store as it is. Nothing is created or contacted yet.

    Example:
        >>> open_store("/tmp/run/5").url
        'file:///tmp/run/5/'
    """
    if isinstance(path, AbstractStore):
        return path
    text = os.fspath(path)
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"A checkpoint path is a non-empty string or os.PathLike, not {path!r}.")
    options = options or StorageOptions()
    if "://" not in text:
        return LocalStore(text)
    # By hand: urlsplit would cut off what follows '#' or '?', which names of objects may hold.
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    first, _, path = rest.partition("/")
    if scheme == "file":
        if first not in ("", "localhost"):
            raise InvalidArgumentError(f"{text!r} names the host {first!r}; a local file URL is file:///path.")
        return LocalStore("/" + unquote(path))
    if scheme == "memory":
        key = _folder(rest)
        return KvStore(f"memory://{key}", {"driver": "memory", "path": key}, parallel_io=2)
    if scheme in ("s3", "gs") and not first:
        raise InvalidArgumentError(f"{text!r} names no bucket; write {scheme}://bucket/path.")
    key = _folder(path)
    if scheme == "s3":
        return KvStore(f"s3://{first}/{key}", _s3(first, key, options))
    if scheme == "gs":
        return KvStore(f"gs://{first}/{key}", _gcs(first, key, options))
    raise InvalidArgumentError(
        f"{text!r} has an unknown scheme {scheme!r}; known are {', '.join(SCHEMES)} and plain paths."
    )


def location_text(path: Location) -> str:
    """A location as it is named in messages and among processes."""
    return path.url if isinstance(path, AbstractStore) else os.fspath(path)


def _folder(path: str) -> str:
    path = path.strip("/")
    return f"{path}/" if path else ""


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
    elif bool(options.access_key_id) != bool(options.secret_access_key):
        raise InvalidArgumentError("StorageOptions has one of access_key_id and secret_access_key; S3 needs both.")
    elif options.access_key_id and options.secret_access_key:
        keys = (options.access_key_id, options.secret_access_key, options.session_token or "")
        path = _credentials_file(*keys)
        spec["aws_credentials"] = {
            "type": "profile",
            "profile": "default",
            "credentials_file": path,
            "config_file": path,
        }
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
    set_before = _http_url(os.environ.get(_GCS_URL, ""))
    emulator = _http_url(os.environ.get("STORAGE_EMULATOR_HOST", ""))
    endpoint = _http_url(options.endpoint or "") or set_before or emulator
    if endpoint:
        if set_before not in ("", endpoint):
            raise InvalidArgumentError(
                f"GCS has one endpoint per process: {_GCS_URL} names {set_before}, StorageOptions names {endpoint}. "
                f"Unset the variable, or use another process for the other endpoint."
            )
        # TensorStore's gcs driver takes an endpoint from this variable alone, whenever it opens a bucket.
        os.environ[_GCS_URL] = endpoint
        if options.anonymous or endpoint == emulator:
            # Without credentials TensorStore would ask the machine's metadata server; an emulator takes any token.
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anonymous")
    return {"driver": "gcs", "bucket": bucket, "path": key}


def _http_url(endpoint: str) -> str:
    """An endpoint as a URL: emulators are often given as host:port."""
    return endpoint.rstrip("/") if "://" in endpoint or not endpoint else f"http://{endpoint.rstrip('/')}"
