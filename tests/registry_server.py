"""A schema registry for tests, over real HTTP: schemas by id, subjects, and faults on demand."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Schemas:
    """What the registry has. faults: status codes of the next answers. seen: what was asked."""

    def __init__(self):
        self.url = ""
        self.by_id = {}
        self.faults = []
        self.seen = []
        self.credentials = []

    def add(self, schema):
        text = json.dumps(schema)
        for number, known in self.by_id.items():
            if known == text:
                return number
        self.by_id[len(self.by_id) + 1] = text
        return len(self.by_id)


@contextmanager
def serving():
    schemas = Schemas()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            number = int(self.path.rpartition("/")[2])
            found = schemas.by_id.get(number)
            self._answer(200 if found else 404, {"schema": found})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(200, {"id": schemas.add(json.loads(body["schema"]))})

        def _answer(self, status, found):
            schemas.seen.append(self.path)
            schemas.credentials.append(self.headers.get("Authorization"))
            if schemas.faults:
                status = schemas.faults.pop(0)
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    schemas.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield schemas
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def registry():
    with serving() as schemas:
        yield schemas
