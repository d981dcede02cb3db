"""An S3 of this process that fails on purpose: moto's server behind a layer that draws faults from a seed."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
FAULTS = ("500", "503", "reset", "slow")
"""What a request may meet; see `Bucket.rate`."""
CODES = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Slow Down", "SlowDown")}
NAME = "bucket"
SECRET = "harmless-words-that-no-file-may-hold"


@dataclass(kw_only=True, slots=True)
class Bucket:
    """One bucket on a local server.

    Attributes:
        endpoint: Its address.
        rate: Share of requests that meet a fault.
        kinds: The faults that are drawn.
        chance: What draws them.
        seen: Requests by method.
        met: Faults by kind.
        after: Called with the number of each request, before it is answered.
    """

    endpoint: str = ""
    rate: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    seen: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    after: Callable[[int], None] = lambda number: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it, as AWS's own tools read it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "harmless-name",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, name: str) -> str:
        """Return the address of something in the bucket."""
        return f"s3://{NAME}/{name}"

    def draw(self, method: str) -> str | None:
        """Count a request, and return the fault that it meets, if any."""
        with self.lock:
            self.seen[method] += 1
            self.after(self.seen.total())
            if self.chance.random() >= self.rate:
                return None
            fault = self.chance.choice(self.kinds)
            self.met[fault] += 1
            return fault


@contextmanager
def bucket() -> Iterator[Bucket]:
    """Start a server with an empty bucket; it ends with the block."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *words: Any) -> None:
            pass

    held, moto = Bucket(), DomainDispatcherApplication(create_backend_app)

    def answer(environ: Mapping[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        fault = held.draw(environ["REQUEST_METHOD"])
        if fault in CODES:
            status, code = CODES[fault]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = ERROR.format(code=code).encode()
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if fault == "reset":
            raw = environ["werkzeug.socket"]
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Or the server would keep the connection, and the client wait a minute.
            raw.shutdown(socket.SHUT_RD)
            raise ConnectionResetError  # the server closes the connection, and with it goes a reset
        if fault == "slow":
            time.sleep(0.5)
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
    held.endpoint = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        boto3.client(
            "s3",
            endpoint_url=held.endpoint,
            region_name="us-east-1",
            aws_access_key_id="harmless-name",
            aws_secret_access_key=SECRET,
        ).create_bucket(Bucket=NAME)
        yield held
    finally:
        server.shutdown()
        thread.join()
