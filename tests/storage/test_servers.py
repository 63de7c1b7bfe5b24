"""The servers that tests rely on, and what only shows against servers: credentials, lost answers, big objects."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import numpy as np
import pytest

from jaxckpt.core.errors import StorageError
from jaxckpt.storage.url import StorageOptions, open_store
from jaxckpt.testing.servers import Server, fake_gcs, seaweed_s3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIG = 6 * 1024 * 1024  # more than servers and clients handle in one piece


def _port(server: Server) -> int:
    return urlsplit(server.options.endpoint or "").port or 0


def _is_served(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["s3_server", "gcs_server"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def test_an_object_of_some_size_arrives_whole(server: Server) -> None:
    store = open_store(f"{server.url}big", server.options)
    data = np.random.default_rng(0).integers(0, 256, BIG, dtype=np.uint8)
    writer = store.open_data("d/a")
    for piece in np.array_split(data, 7):
        writer.append(piece)
    assert writer.close() == BIG
    assert store.read("d/a") == data.tobytes()
    out = np.empty(BIG // 2, np.uint8)
    store.read_into("d/a", BIG // 3, out)
    np.testing.assert_array_equal(out, data[BIG // 3 :][: BIG // 2])
    store.delete("d/a")


def test_variables_say_where_the_server_is(server: Server) -> None:
    code = """
import sys
from jaxckpt.storage.url import open_store
store = open_store(sys.argv[1])
assert store.create("a", b"x")
print(store.names(), store.read("a"))
"""
    # The variable would decide where the server in this process is, too.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TENSORSTORE_", "GOOGLE_"))}
    command = [sys.executable, "-c", code, f"{server.url}by-variables"]
    done = subprocess.run(command, env={**env, **server.env}, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "['a'] b'x'\n", done.stderr
    assert open_store(f"{server.url}by-variables", server.options).read("a") == b"x"


@pytest.mark.parametrize(
    "options",
    [{"access_key_id": "jaxckpt-key", "secret_access_key": "wrong"}, {"access_key_id": "x", "secret_access_key": "y"}],
)
def test_who_may_not_is_told_so(s3_server: Server, options: dict[str, str]) -> None:
    store = open_store(f"{s3_server.url}run", StorageOptions(endpoint=s3_server.options.endpoint, **options))
    for use in (
        lambda: store.write("a", b"x"),
        lambda: store.create("a", b"x"),
        lambda: store.read("a"),
        lambda: store.read("a", start=1, stop=2),
        lambda: store.exists("a"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StorageError, match="s3://jaxckpt-tests/run/a") as caught:
            use()
        assert "PERMISSION_DENIED" in str(caught.value)


@pytest.mark.parametrize("start", [seaweed_s3, fake_gcs])
def test_a_server_ends_with_its_block(
    start: Callable[[], contextlib.AbstractContextManager[Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)  # its port may be in use
    port = 0

    def use() -> None:
        nonlocal port
        with start() as server:
            port = _port(server)
            assert _is_served(port)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        use()
    assert port
    assert not _is_served(port)


def test_a_server_ends_with_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)
    code = """
import sys
from jaxckpt.testing.servers import fake_gcs
with fake_gcs() as server:
    print(server.options.endpoint, flush=True)
    sys.stdin.read()
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        port = int(owner.stdout.readline().rpartition(":")[2])
        # A connection ends when its server does; that is what we wait for.
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            owner.send_signal(signal.SIGKILL)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    # A process that ends may close its listening socket a moment later.
    deadline = time.monotonic() + 10
    while _is_served(port):
        assert time.monotonic() < deadline


class _ForgetfulGcs(http.server.BaseHTTPRequestHandler):
    """Enough of GCS for objects that are created: it keeps the first upload, and answers it with an error."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    competitor: bytes | None  # comes before the first upload

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        data = self.objects.get(unquote(path.path.rpartition("/o/")[2]))
        if data is None:
            self._answer(404, b"{}")
        elif "media" in parse_qs(path.query).get("alt", []):
            self._answer(200, data)
        else:
            self._answer(200, b'{"generation": "1"}')

    def do_POST(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert query["ifGenerationMatch"] == ["0"]
        [name] = query["name"]
        if name in self.objects:
            self._answer(412, b"{}")
        else:
            self.objects[name] = data if self.competitor is None else self.competitor
            self._answer(503, b"{}")

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def forgetful_gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_ForgetfulGcs]]:
    class Handler(_ForgetfulGcs):
        objects, competitor = {}, None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody")
        try:
            yield Handler
        finally:
            server.shutdown()
            thread.join()


OURS, THEIRS = b'{"write-id": "ours"}', b'{"write-id": "theirs"}'


@pytest.mark.parametrize(
    ("data", "competitor", "created"),
    [(OURS, None, True), (OURS, THEIRS, False), (b"anyone's", None, False), (b"anyone's", b"anyone's", False)],
)
def test_a_create_whose_answer_was_lost_knows_its_own_bytes(
    forgetful_gcs: type[_ForgetfulGcs], data: bytes, competitor: bytes | None, created: bool
) -> None:
    forgetful_gcs.competitor = competitor
    store = open_store(f"gs://forgetful-{uuid4().hex}")  # TensorStore remembers where it found a bucket
    assert store.create("lock", data) is created
    assert forgetful_gcs.objects == {"lock": competitor or data}
