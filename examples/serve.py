"""Serves a model over HTTP: clients post an image and receive its mesh.

    python examples/serve.py model.safetensors --port 8000
    curl --data-binary @chair.png 'http://localhost:8000/mesh?seed=1&format=glb' -o chair.glb
    curl http://localhost:8000/health

POST /mesh takes seed, steps, guidance and format (glb, obj, ply, stl). Errors are one line of JSON,
{"error": ...}: 4xx for the client's mistake, 503 with the seconds after which to retry. After one
SIGTERM or Ctrl-C the current mesh is still finished and sent; a second one ends the server at once.
It is an example to start from, without TLS and authentication: put it behind a proxy that has both.
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
TYPES["ply"] = "application/octet-stream"  # PLY has no media type
CONNECTIONS = 64  # each has a thread and at most one body; more wait in the system's backlog


class Refused(Exception):
    """A response other than 200."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def parameters(query: str) -> GenerateOptions:
    """The options in a URL query. Raises Refused or UserError if one is invalid."""
    values: dict[str, Any] = {}
    given = parse_qsl(query, keep_blank_values=True)
    for name, text in given:
        if name not in PARAMETERS or [n for n, _ in given].count(name) > 1:
            raise Refused(400, f"parameter {name!r}: expected {', '.join(PARAMETERS)}, once each")
        try:
            values[name] = PARAMETERS[name](text)
        except (ValueError, UserError) as error:
            raise Refused(400, f"{name}: {error}") from None
    if values.get("format", "glb") not in TYPES:
        raise Refused(400, f"format: {values['format']!r}: expected one of {', '.join(TYPES)}")
    return GenerateOptions(**values)


class Server(ThreadingHTTPServer):
    """One thread per connection, and one worker thread that decodes images, computes and encodes
    meshes, one at a time: memory is needed for one generation, and torch keeps its threads."""

    daemon_threads = True  # a slow client must not delay the exit
    request_queue_size = 128

    def __init__(self, pipeline: Pipeline, options: argparse.Namespace) -> None:
        self.pipeline, self.options = pipeline, options
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        self.worker, self.adding = ThreadPoolExecutor(1), threading.Lock()
        self.jobs: set[Future[bytes]] = set()  # jobs not finished or not answered yet
        self.meshes, self.seconds = 0, 1.0  # meshes so far; seconds of the last one
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
        if not isinstance(sys.exc_info()[1], OSError):  # the client has disconnected
            super().handle_error(request, client_address)

    def unfinished(self) -> int:
        return sum(not job.done() for job in self.jobs.copy())

    def expect_room(self) -> None:
        if self.stopping or self.unfinished() > self.options.queue:
            raise self.busy()

    def busy(self) -> Refused:
        reason = "the server is stopping" if self.stopping else "too many images are waiting"
        seconds = str(max(1, round(self.seconds)))
        return Refused(503, f"{reason}; try again in {seconds} s", **{"Retry-After": seconds})

    def submit(self, *arguments: Any) -> Future[bytes]:
        with self.adding:
            self.expect_room()
            job = self.worker.submit(self.make, *arguments)
            self.jobs.add(job)
        return job

    def make(self, client: "Handler", options: GenerateOptions) -> bytes:
        start = time.monotonic()
        image = decode_image(client.image, "image")
        mesh = self.pipeline(image, options, name="image", control=client.control)
        body = encode(mesh, f"mesh.{options.format}")
        self.meshes, self.seconds = self.meshes + 1, time.monotonic() - start
        return body

    def stop(self) -> None:
        """Accepts no new jobs, finishes the current one and refuses those waiting."""
        with self.adding:
            self.stopping = True
        self.server_close()
        self.worker.shutdown(cancel_futures=True)
        while self.jobs:  # until all are answered
            time.sleep(0.05)


class Request(io.RawIOBase):
    """Reads a client's request. Raises TimeoutError `seconds` after its start."""

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
    protocol_version = "HTTP/1.1"  # for "Expect: 100-continue", as curl sends it
    default_request_version = "HTTP/1.0"  # so that malformed requests get a status line too
    job: Future[bytes] | None = None
    image = b""

    def setup(self) -> None:
        super().setup()
        self.control = Control()  # cancels this request's job
        self.rfile = io.BufferedReader(Request(self.connection, self.server.options.timeout))

    def finish(self) -> None:
        # Closing with unread bytes would reset the connection, and the response might be lost.
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
        except (ConnectionError, TimeoutError):  # the client has disconnected or reads no response
            raise
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, FormatError):
                self.refuse(Refused(400, str(error)))
            else:  # such as a damaged model file
                traceback.print_exc()
                self.refuse(Refused(500, "an error inside the server; see its log"))
        finally:
            self.image = b""  # the worker's queue keeps a cancelled job until its turn
            self.control.cancel()  # a job without a client ends within one step
            if self.job:
                self.job.cancel()
                self.job.add_done_callback(self.server.jobs.discard)  # at once if it does not run

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
        self.image = self.body()
        self.job = self.server.submit(self, options)
        while not self.job.done():
            self.expect_client()
            wait([self.job], timeout=1)
        self.reply(200, self.job.result(), TYPES[options.format])

    def body(self) -> bytes:
        """The image's bytes, read after all other checks. Raises Refused if there are none."""
        length, most = self.headers.get("Content-Length"), self.server.options.max_bytes
        if length is None or "Transfer-Encoding" in self.headers:
            raise Refused(411, "no Content-Length; send the image as the body, in one piece")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(400, f"Content-Length: {length!r}: expected a number of bytes")
        if len(length) > 18 or int(length) > most:
            raise Refused(413, f"a body of {length} bytes; at most {most} are accepted")
        if int(length) == 0:
            raise Refused(400, "the body is empty; expected an image's bytes")
        self.server.expect_room()
        try:
            data = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, "the image took too long to arrive") from None
        if len(data) < int(length):
            raise Refused(400, f"the body ended after {len(data)} of {length} bytes")
        return data

    def expect_client(self) -> None:
        """Raises ConnectionError if the client has disconnected."""
        readable = select.select([self.connection], [], [], 0)[0]
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client has disconnected")

    def reply(self, status: int, body: bytes, kind: str = "application/json", **more: str) -> None:
        self.connection.settimeout(self.server.options.timeout)  # for the whole body
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
        """Refuses errors that http.server finds itself; it reports an unknown method as 501."""
        error = Refused(code, message or "bad request")
        self.refuse(Refused(405, str(error), Allow="GET, POST") if code == 501 else error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("model", help="a packed file, or an original checkpoint")
    option("--host", default="127.0.0.1")
    option("--port", type=int, default=8000, help="0: any free port")
    option("--parts", metavar="MODEL", help="original with image encoder and shape decoder")
    option("--device")
    option("--compute", choices=choices.COMPUTES)
    option("--memory", choices=choices.MEMORY_MODES)
    option("--cuda-graphs", action="store_true")
    option("--resolution", type=COUNT, help="cells per side of the decoded grid")
    option("--queue", type=COUNT, default=8, help="images that may wait")
    option("--max-bytes", type=COUNT, default=20_000_000, help="largest image file")
    option("--timeout", type=COUNT, default=60, help="seconds to send an image or receive a mesh")
    options = parser.parse_args()
    try:
        pipeline = Pipeline.open(options.model, filled(PipelineOptions, options))
        if pipeline.memory == "resident":
            pipeline.load()  # before listening: no client waits for it, errors show now
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
