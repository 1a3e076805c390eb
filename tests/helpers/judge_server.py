"""A small OpenAI-compatible server that judges answers, for tests; the fixture `judge_server` starts it."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-nobody-may-read-this"


class Server(ThreadingHTTPServer):
    """Says yes where the last word of the reference stands in the answer; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.keys: set[str | None] = set()
        self.failing: list[int] = []  # status codes of the next replies
        self.always: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.failing:
            self.send_error(self.server.failing.pop(0))
            return
        assert self.path == "/v1/chat/completions"
        self.server.asked.append(body)
        self.server.keys.add(self.headers["Authorization"])
        lines = dict(line.split(": ", 1) for line in body["messages"][1]["content"].splitlines() if ": " in line)
        said = lines["Reference answer"].split()[-1] in lines.get("Answer to check", "")
        reply = self.server.always or ("Yes." if said else "no")
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
