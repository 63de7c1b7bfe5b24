"""Stands before fake-gcs-server so that it keeps `ifGenerationMatch` of simple uploads, as GCS does.

The server (up to 1.5x, in mid 2026) ignores the condition in uploads of type "media", the ones that TensorStore sends,
but keeps it in those of type "multipart". So the one is turned into the other; everything else passes unchanged.
Run as a program, with two ports: the one to listen on and the server's. It needs the standard library alone.
"""

import http.client
import http.server
import json
import sys
from urllib.parse import parse_qs, urlsplit

_BOUNDARY = "jaxckpt-gcs-front"
_NOT_PASSED_ON = {"connection", "content-length", "date", "server", "transfer-encoding"}


def main(port: int, server_port: int) -> None:
    """Serve until the process is ended."""

    class Front(_Front):
        upstream_port = server_port

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Front).serve_forever()


class _Front(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of an answer in one packet
    upstream_port: int

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "content-length"}
        path, headers, body = _as_multipart(self.path, headers, body)
        self.upstream.request(self.command, path, body=body or None, headers=headers)
        answer = self.upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _NOT_PASSED_ON:
                self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815 - the names are http.server's

    def log_message(self, *_: object) -> None:
        return


def _as_multipart(path: str, headers: dict[str, str], body: bytes) -> tuple[str, dict[str, str], bytes]:
    query = parse_qs(urlsplit(path).query)
    if query.get("uploadType") != ["media"]:
        return path, headers, body
    content_type = next((value for name, value in headers.items() if name.lower() == "content-type"), "")
    content_type = content_type or "application/octet-stream"
    description = json.dumps({"name": query["name"][0], "contentType": content_type})
    head = f"--{_BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{description}\r\n"
    head += f"--{_BOUNDARY}\r\nContent-Type: {content_type}\r\n\r\n"
    headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
    headers["Content-Type"] = f"multipart/related; boundary={_BOUNDARY}"
    path = path.replace("uploadType=media", "uploadType=multipart")
    return path, headers, head.encode() + body + f"\r\n--{_BOUNDARY}--\r\n".encode()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
