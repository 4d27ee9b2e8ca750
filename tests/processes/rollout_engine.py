"""A small engine: GET /health, POST /generate, POST /crash, and a profiler's routes where it was started with them.

    rollout_engine.py PORT STARTS [--profiler]

Adds a line to the file STARTS when it starts, and one for each request to its profiler.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Answers with JSON."""

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/generate":
            number = json.loads(body)["number"]
            self._answer(200, {"tokens": [(number * 7 + each * 13) % 31 for each in range(5)]})
        elif self.path == "/crash":
            os._exit(3)
        elif "--profiler" in sys.argv and self.path in ("/start_profile", "/stop_profile"):
            note(f"{self.path} {body.decode()}")
            self._answer(200, {})
        else:
            self._answer(404, {"detail": "Not Found"})

    def _answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def note(line: str) -> None:
    """Add a line."""
    with Path(sys.argv[2]).open("a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        note(f"listening {server.server_port}")
        sys.stdout.write(f"listening on {server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()
