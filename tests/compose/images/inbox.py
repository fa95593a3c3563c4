"""The inbox's stand-in: the journaled sink, shown as Mailpit's API shows its messages."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import sink

JOURNAL = Path("/tmp/journal.jsonl")
ADDRESS = "0.0.0.0"
SMTP_PORT, HTTP_PORT = 1025, 8025
DEFAULT_LIMIT = 50


class Api(BaseHTTPRequestHandler):
    """GET /api/v1/messages, newest first, and /readyz."""

    def do_GET(self) -> None:
        """Answer."""
        url = urlsplit(self.path)
        if url.path == "/readyz":
            self._answer({})
        elif url.path == "/api/v1/messages":
            query = parse_qs(url.query)
            start, limit = (
                int(query.get(name, [default])[0])
                for name, default in (("start", 0), ("limit", DEFAULT_LIMIT))
            )
            mails = sink.accepted(JOURNAL)
            newest = [_message(mail) for mail in reversed(mails)]
            self._answer({"total": len(mails), "messages": newest[start : start + limit]})
        else:
            self.send_error(404)

    def _answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


def _message(mail: sink.Accepted) -> dict[str, Any]:
    return {
        "ID": mail.sha256,
        "MessageID": (mail.message_id or "").strip("<>"),
        "To": [{"Address": mail.recipient}],
    }


def main() -> None:
    """Serve both until SIGTERM."""
    server = ThreadingHTTPServer((ADDRESS, HTTP_PORT), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asyncio.run(sink.serve(SMTP_PORT, sink.Script(None), sink.Journal(JOURNAL), host=ADDRESS))


if __name__ == "__main__":
    main()
