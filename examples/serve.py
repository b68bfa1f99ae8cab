"""A model behind HTTP: a picture is posted, its mesh comes back.

    python examples/serve.py model.safetensors --port 8000
    curl --data-binary @chair.png 'http://localhost:8000/mesh?seed=1&format=glb' -o chair.glb
    curl http://localhost:8000/health

POST /mesh takes seed, steps, guidance and format (glb, obj, ply, stl). Whatever goes wrong is one
line of JSON, {"error": ...}: 4xx for the client's mistake; 503 says in how many seconds to try
again. After SIGTERM or Ctrl-C the mesh at hand is still finished and sent, unless there is another.
An example to start from: it has no TLS and no authentication, put it behind a proxy that has.
"""

import argparse
import io
import json
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import vitapack
from vitapack.runtime import choices
from vitapack.runtime.condition.images import decode_image
from vitapack.runtime.decode.mesh import encode
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.options import GenerateOptions, PipelineOptions
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control
from vitapack.terminal import COUNT, filled

PARAMETERS: dict[str, Callable[[str], Any]] = {
    "seed": choices.seed,
    "steps": choices.at_least_one,
    "guidance": float,
    "format": str,
}
TYPES = {"glb": "model/gltf-binary", "obj": "model/obj", "stl": "model/stl"}
TYPES["ply"] = "application/octet-stream"  # which has no type of its own
CONNECTIONS = 64  # each with a thread and at most one body; more wait in the system's backlog


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def parameters(query: str) -> GenerateOptions:
    found: dict[str, Any] = {}
    given = parse_qsl(query, keep_blank_values=True)
    for name, text in given:
        if name not in PARAMETERS or [n for n, _ in given].count(name) > 1:
            raise Refused(400, f"parameter {name!r}: expected {', '.join(PARAMETERS)}, once each")
        try:
            found[name] = PARAMETERS[name](text)
        except (ValueError, UserError) as error:
            raise Refused(400, f"{name}: {error}") from None
    if found.get("format", "glb") not in TYPES:
        raise Refused(400, f"format: {found['format']!r}: expected one of {', '.join(TYPES)}")
    return GenerateOptions(**found)  # UserError


class Server(ThreadingHTTPServer):
    """A thread for each connection, and one in which all pictures are decoded, computed and
    encoded: memory is needed for one at a time, and torch keeps its threads."""

    daemon_threads = True  # a slow client must not hold up the end
    request_queue_size = 128

    def __init__(self, pipeline: Pipeline, options: argparse.Namespace) -> None:
        self.pipeline, self.options = pipeline, options
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        self.worker, self.adding = ThreadPoolExecutor(1), threading.Lock()
        self.jobs: set[Future[bytes]] = set()  # those computed or not answered yet
        self.meshes, self.seconds = 0, 1.0  # made so far; of the last one
        self.stopping = False
        super().__init__((options.host, options.port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has hung up
            super().handle_error(request, client_address)

    def unfinished(self) -> int:
        return sum(not job.done() for job in self.jobs.copy())

    def expect_room(self) -> None:
        if self.stopping or self.unfinished() > self.options.queue:
            raise self.busy()

    def busy(self) -> Refused:
        why = "the server is stopping" if self.stopping else "too many pictures are waiting"
        seconds = str(max(1, round(self.seconds)))
        return Refused(503, f"{why}; try again in {seconds} s", **{"Retry-After": seconds})

    def submit(self, *arguments: Any) -> Future[bytes]:
        with self.adding:
            self.expect_room()
            job = self.worker.submit(self.make, *arguments)
            self.jobs.add(job)
        return job

    def make(self, client: "Handler", options: GenerateOptions) -> bytes:
        start = time.monotonic()
        image = decode_image(client.picture, "picture")
        mesh = self.pipeline(image, options, name="picture", control=client.control)
        body = encode(mesh, f"mesh.{options.format}")
        self.meshes, self.seconds = self.meshes + 1, time.monotonic() - start
        return body

    def stop(self) -> None:
        """Takes nothing new, finishes the mesh at hand, refuses those that wait."""
        with self.adding:
            self.stopping = True
        self.server_close()
        self.worker.shutdown(cancel_futures=True)
        while self.jobs:  # answers on their way
            time.sleep(0.05)


class Incoming(io.RawIOBase):
    """What a client sends within so many seconds, all in all; TimeoutError after that."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(max(self.end - time.monotonic(), 1e-3))
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request, after which the connection is closed."""

    server: Server
    server_version, sys_version = f"vitapack/{vitapack.__version__}", ""
    protocol_version = "HTTP/1.1"  # curl asks before it sends a large body
    default_request_version = "HTTP/1.0"  # so that garbage is answered with a status too
    job: Future[bytes] | None = None
    picture = b""

    def setup(self) -> None:
        super().setup()
        self.control = Control()  # of the mesh that this request asks for
        self.rfile = io.BufferedReader(Incoming(self.connection, self.server.options.timeout))

    def finish(self) -> None:
        # To close with bytes unread would reset the connection, and the answer might be lost.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(1 << 16):
                pass
        super().finish()

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        routes = {"/mesh": ("POST", self.mesh), "/health": ("GET", self.health)}
        try:
            if path not in routes:
                raise Refused(404, f"no {path}; there are POST /mesh and GET /health")
            method, run = routes[path]
            if self.command != method:
                raise Refused(405, f"{path} takes {method}", Allow=method)
            run(query)
        except Refused as error:
            self.refuse(error)
        except CancelledError:
            self.refuse(self.server.busy())
        except (ConnectionError, TimeoutError):  # the client has hung up, or takes no answer
            raise
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, FormatError):
                self.refuse(Refused(400, str(error)))
            else:  # a damaged model's file among others
                traceback.print_exc()
                self.refuse(Refused(500, "an error inside the server; its log says more"))
        finally:
            self.picture = b""  # the worker keeps what is cancelled until it comes to it
            self.control.cancel()  # a mesh that nobody waits for ends within a step
            if self.job:
                self.job.cancel()
                self.job.add_done_callback(self.server.jobs.discard)  # now, if it does not run

    do_GET = do_POST

    def health(self, query: str) -> None:
        pipeline, unfinished = self.server.pipeline, self.server.unfinished()
        state = {
            "model": Path(pipeline.source).name,
            "family": pipeline.family,
            "sha256": pipeline.source_sha256,
            "vitapack": vitapack.__version__,
            "device": pipeline.device,
            "meshes": self.server.meshes,
            "computing": unfinished > 0,
            "waiting": max(0, unfinished - 1),
        }
        self.reply(200, json.dumps(state).encode() + b"\n")

    def mesh(self, query: str) -> None:
        options = parameters(query)
        self.server.pipeline.settings(options.steps, options.guidance, None)
        self.picture = self.body()
        self.job = self.server.submit(self, options)
        while not self.job.done():
            self.expect_client()
            wait([self.job], timeout=1)
        self.reply(200, self.job.result(), TYPES[options.format])

    def body(self) -> bytes:
        """The picture's bytes, read only once nothing speaks against it."""
        length, most = self.headers.get("Content-Length"), self.server.options.max_bytes
        if length is None or "Transfer-Encoding" in self.headers:
            raise Refused(411, "no Content-Length; send the picture as the body, in one piece")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(400, f"Content-Length: {length!r}: expected a number of bytes")
        if len(length) > 18 or int(length) > most:
            raise Refused(413, f"a body of {length} bytes; at most {most} are taken")
        if int(length) == 0:
            raise Refused(400, "the body is empty; expected a picture's bytes")
        self.server.expect_room()
        try:
            data = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, "the picture took too long to arrive") from None
        if len(data) < int(length):
            raise Refused(400, f"the body ended after {len(data)} of {length} bytes")
        return data

    def expect_client(self) -> None:
        """ConnectionError if the client has hung up."""
        readable = select.select([self.connection], [], [], 0)[0]
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client has hung up")

    def reply(self, status: int, body: bytes, kind: str = "application/json", **more: str) -> None:
        self.connection.settimeout(self.server.options.timeout)  # for all of the body
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in (headers | more).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, error: Refused) -> None:
        line = " ".join(str(error)[:300].split())
        self.log_error("%s", line)
        self.reply(error.status, json.dumps({"error": line}).encode() + b"\n", **error.headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses. A method without a function here is 501 to it."""
        error = Refused(code, message or "bad request")
        self.refuse(Refused(405, str(error), Allow="GET, POST") if code == 501 else error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("model", help="a packed file, or an original checkpoint")
    option("--host", default="127.0.0.1")
    option("--port", type=int, default=8000, help="0: any that is free")
    option("--parts", metavar="MODEL", help="original that holds encoder and decoder")
    option("--device")
    option("--compute", choices=choices.COMPUTES)
    option("--memory", choices=choices.MEMORY_MODES)
    option("--cuda-graphs", action="store_true")
    option("--resolution", type=COUNT, help="cells a side of the decoded grid")
    option("--queue", type=COUNT, default=8, help="pictures that may wait")
    option("--max-bytes", type=COUNT, default=20_000_000, help="of a picture's file")
    option("--timeout", type=COUNT, default=60, help="seconds to send one, or take a mesh")
    options = parser.parse_args()
    try:
        pipeline = Pipeline.open(options.model, filled(PipelineOptions, options))
        if pipeline.memory == "resident":
            pipeline.load()  # before it listens: the first client waits for none, errors show now
        server = Server(pipeline, options)
    except (UserError, OSError, OverflowError) as error:
        parser.exit(2, f"serve: {error}\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"{options.model} at http://{options.host}:{server.server_port}", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        server.stop()


if __name__ == "__main__":
    main()
