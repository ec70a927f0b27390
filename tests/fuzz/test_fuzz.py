"""Damaged input ends as a right result or as one clear line; never as a crash, a hang, or a wrong result.

`python -m pytest tests/fuzz --fuzz 50` runs fifty times as many cases.
"""

from __future__ import annotations

import contextlib
import http.server
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from utils.errors import UserError
from weights import released

CASES = {"annotations": 150, "checkpoints": 80, "images": 300, "inputs": 16, "resume": 24}
SLOW = ("resume", "checkpoints")
MEMORY = 2500  # MiB


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in CASES])
def test_damaged_input(kind, tmp_path, pytestconfig):
    count = CASES[kind] * pytestconfig.getoption("--fuzz")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("cases.py")), kind, str(tmp_path), "0"]
    done = subprocess.run([*command, str(count)], capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"case {last!r}\n{done.stderr[-3000:]}"
    outcomes = Counter(re.findall(r" (right|refused)$", done.stdout, re.MULTILINE))
    assert sum(outcomes.values()) == count
    print(kind, dict(outcomes), last)
    assert outcomes["right"] > 0
    assert kind in ("inputs",) or outcomes["refused"] > 0
    assert int(last.split()[1]) < MEMORY


@contextlib.contextmanager
def serve(answer):
    """A server that answers each connection with `answer(connection)`; its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            with contextlib.suppress(OSError):  # the client has gone
                answer(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/w.pth"
        finally:
            server.shutdown()


def drip(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(200):
        connection.sendall(b"P")
        time.sleep(0.05)


def redirect(to):
    return b"HTTP/1.1 302 Found\r\nLocation: " + to + b"\r\nContent-Length: 0\r\n\r\n"


def page(body, headers=b""):
    return b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


HEAD = released.BUNDLED.read_bytes()[:50_000]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "a login page": page(b"<html>Sign in</html>"),
    "nothing": page(b""),
    "half a file": page(HEAD),
    "half a file, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n"
    + HEAD[:0xFFF]
    + b"\r\n0\r\n\r\n",
    "a broken chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc",
    "less than stated": b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\nPK",
    "a length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nPK",
    "no headers": b"hello\r\n\r\n",
    "a header without end": b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * 70_000,
    "a redirect to a file": redirect(b"file:///etc/passwd"),
    "a redirect to ftp": redirect(b"ftp://127.0.0.1/w.pth"),
    "a redirect to nowhere": redirect(b"http://"),
    "an error": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    "a byte now and then": drip,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_bad_downloads(name, tmp_path):
    answer = ANSWERS[name]
    respond = answer if callable(answer) else lambda connection: connection.sendall(answer)
    started = time.time()
    with serve(respond) as url, pytest.raises(UserError) as error:
        released.download(url, tmp_path, timeout=2, patience=1)
    assert time.time() - started < 20
    assert str(error.value).startswith("w.pth: ")
    assert "to do it by hand" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_loop_ends(tmp_path):
    class Loop(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"/{time.time()}")
            self.end_headers()

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Loop) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/w.pth"
        with pytest.raises(UserError, match="cannot be downloaded"):
            released.download(url, tmp_path, timeout=5)
        server.shutdown()
