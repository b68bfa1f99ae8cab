"""examples/serve.py as its clients meet it: the right mesh, or one plain line and its status."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from vitapack.cli import main
from vitapack.runtime.condition.images import load_image
from vitapack.runtime.decode.mesh import Mesh, encode, read_metadata
from vitapack.runtime.families.furniture.family import held_out
from vitapack.runtime.pipeline.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
PICTURE = next(held_out("unseen-views")).image_path
BODY = PICTURE.read_bytes()
SLOW = "/mesh?steps=40"  # some seconds


class Served:
    """A server in a process of its own, and what a client needs."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.port = int(process.stdout.readline().rsplit(":", 1)[1])

    def send(self, path: str, body: bytes | None = BODY, method: str = "POST") -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body)
        return connection

    def ask(self, *arguments: object) -> tuple[int, bytes, dict[str, str]]:
        return answer(self.send(*arguments))

    def raw(self, text: bytes) -> bytes:
        """What comes back, up to the end, to bytes that http.client would not send."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(text)
            with connection.makefile("rb") as file:
                return file.read()

    def wait_until(self, wanted: Callable[[dict], bool]) -> dict:
        for _ in range(600):
            state = json.loads(self.ask("/health", None, "GET")[1])
            if wanted(state):
                return state
            time.sleep(0.05)
        raise AssertionError(f"still {state} after 30 s")


def answer(connection: HTTPConnection) -> tuple[int, bytes, dict[str, str]]:
    with closing(connection):
        response = connection.getresponse()
        return response.status, response.read(), dict(response.headers)


def complaint(body: bytes) -> str:
    assert body.count(b"\n") == 1
    assert body.endswith(b"\n")
    [(key, line)] = json.loads(body).items()
    assert key == "error"
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "model.safetensors"
    main(["compress", "furniture", "--plan", "int8", "-o", str(path), "--quiet", "--steps", "2,40"])
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    call = [sys.executable, "examples/serve.py", model, "--port", "0", "--device", "cpu"]
    call += ["--memory", "lean", "--queue", "1", "--timeout", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = model.with_suffix(".log")
    with (
        log.open("w") as file,
        subprocess.Popen(
            call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        ) as process,
    ):
        yield Served(process, log)
        process.kill()


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.open(model, device="cpu")


def made(pipeline: Pipeline, seed: int, steps: int = 2) -> bytes:
    return encode(pipeline(load_image(PICTURE), seed=seed, steps=steps), "mesh.glb")


@pytest.fixture(scope="module")
def mesh(pipeline: Pipeline) -> Mesh:
    return pipeline(load_image(PICTURE), seed=3, steps=2, guidance=2.5)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("glb", "model/gltf-binary"),
        ("obj", "model/obj"),
        ("ply", "application/octet-stream"),
        ("stl", "model/stl"),
    ],
)
def test_a_mesh_is_the_pipelines_own(
    server: Served, mesh: Mesh, tmp_path: Path, suffix: str, kind: str
) -> None:
    status, body, headers = server.ask(f"/mesh?seed=3&steps=2&guidance=2.5&format={suffix}")
    assert (status, headers["Content-Type"]) == (200, kind)
    assert body == encode(mesh, f"mesh.{suffix}")
    path = tmp_path / f"mesh.{suffix}"
    path.write_bytes(body)
    found = read_metadata(path)
    assert found["family"] == "furniture"
    if suffix != "stl":  # which has room for some of it only
        assert found == mesh.metadata


def test_two_at_once_get_each_their_own(server: Served, pipeline: Pipeline) -> None:
    with ThreadPoolExecutor(2) as clients:
        paths = ("/mesh?steps=2&seed=4", "/mesh?steps=2&seed=5")
        first, second = clients.map(server.ask, paths)
    assert (first[0], second[0]) == (200, 200)
    assert first[1] == made(pipeline, 4)
    assert second[1] == made(pipeline, 5)


def test_health_tells_what_is_served(server: Served, pipeline: Pipeline) -> None:
    before = server.wait_until(lambda state: not state["computing"])
    assert (
        before.items()
        >= {
            "model": "model.safetensors",
            "family": "furniture",
            "sha256": pipeline.source_sha256,
            "device": "cpu",
            "waiting": 0,
        }.items()
    )
    assert server.ask("/mesh?steps=2")[0] == 200
    assert server.wait_until(lambda _: True)["meshes"] == before["meshes"] + 1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("seed=-1", "seed: '-1': expected a whole number"),
        ("seed", "seed: '': expected"),
        ("seed=" + "0" * 20 + "9" * 20, "expected a whole number, 0 to 2^63 - 1"),
        ("seed=1&seed=2", "parameter 'seed': expected seed, steps, guidance, format, once each"),
        ("colour=red", "parameter 'colour': expected"),
        ("steps=0", "steps: '0': expected a whole number of at least 1"),
        ("steps=7", "this file holds euler 2 steps, euler 40 steps"),
        ("guidance=strong", "guidance: could not convert"),
        ("guidance=nan", "guidance nan: expected a number"),
        ("format=fbx", "format: 'fbx': expected one of glb,"),
    ],
)
def test_a_bad_parameter_is_one_plain_line(server: Served, query: str, words: str) -> None:
    status, body, _ = server.ask(f"/mesh?{query}")
    assert status == 400
    assert words in complaint(body)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "the body is empty"),
        (BODY[:2000], 400, "image: damaged image"),
        (b"no picture", 400, "image: not an image"),
        (bytes(40_000_000), 413, "a body of 40000000 bytes; at most 20000000"),
        (iter([BODY]), 411, "no Content-Length"),  # http.client sends it in chunks
    ],
    ids=["empty", "cut", "text", "large", "chunked"],
)
def test_a_bad_body(server: Served, body: bytes, status: int, words: str) -> None:
    found, line, _ = server.ask("/mesh", body)
    assert found == status
    assert words in complaint(line)


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("POST", "/", 404, None),
        ("GET", "/mesh.glb", 404, None),
        ("GET", "/mesh", 405, "POST"),
        ("POST", "/health", 405, "GET"),
        ("DELETE", "/mesh", 405, "GET, POST"),
    ],
)
def test_another_path_or_method(
    server: Served, method: str, path: str, status: int, allowed: str | None
) -> None:
    found, body, headers = server.ask(path, None, method)
    assert (found, headers.get("Allow")) == (status, allowed)
    assert complaint(body)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x00\n\n", 400),  # as TLS begins
        (b"POST /mesh HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n", 400),
        (b"POST /mesh HTTP/1.1\r\nContent-Length: 40000000\r\n\r\n", 413),  # no byte of it is sent
        (b"POST /mesh HTTP/1.1\r\nContent-Length: 1" + b"0" * 5000 + b"\r\n\r\n", 413),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"POST /mesh HTTP/1.1\r\nContent-Length: 10\r\n\r\nnine byte", 408),  # and then nothing
    ],
    ids=["tls", "underscore", "large", "larger", "long", "slow"],
)
def test_odd_requests(server: Served, request_: bytes, status: int) -> None:
    head, _, body = server.raw(request_).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert complaint(body)


def test_the_queue_is_bounded_and_whoever_hangs_up_leaves_it(server: Served) -> None:
    made_before = server.wait_until(lambda state: not state["computing"])["meshes"]
    first = server.send(SLOW)
    server.wait_until(lambda state: state["computing"])
    second = server.send(SLOW)
    server.wait_until(lambda state: state["waiting"] == 1)
    status, body, headers = server.ask(SLOW)
    assert status == 503
    assert "too many images are waiting" in complaint(body)
    assert int(headers["Retry-After"]) >= 1
    first.close()
    second.close()
    state = server.wait_until(lambda state: not state["computing"])
    assert state["meshes"] == made_before
    assert "Traceback" not in server.log.read_text()


def test_a_failure_inside_is_500_and_the_server_goes_on(server: Served, model: Path) -> None:
    before = server.log.read_text()
    away = model.rename(model.with_suffix(".away"))  # a lean pipeline loads it for each picture
    try:
        status, body, _ = server.ask("/mesh?steps=2")
    finally:
        away.rename(model)
    assert status == 500
    assert complaint(body) == "an error inside the server; see its log"
    assert "Traceback" in server.log.read_text().removeprefix(before)
    assert server.ask("/mesh?steps=2")[0] == 200


def test_a_bad_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "examples/serve.py"), run_name="__main__")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none.safetensors" in error


def test_sigterm_finishes_what_is_computed(server: Served, pipeline: Pipeline) -> None:
    """The last test: it ends the server of all of them."""
    before = server.log.read_text()
    first = server.send(f"{SLOW}&seed=6")
    server.wait_until(lambda state: state["computing"])
    second = server.send(SLOW)
    server.wait_until(lambda state: state["waiting"] == 1)
    server.process.send_signal(signal.SIGTERM)
    status, body, headers = answer(second)
    assert (status, complaint(body)[:22]) == (503, "the server is stopping")
    assert "Retry-After" in headers
    status, body, _ = answer(first)
    assert (status, body) == (200, made(pipeline, 6, steps=40))
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(ConnectionRefusedError):
        server.send("/health", None, "GET")
    assert "Traceback" not in server.log.read_text().removeprefix(before)
