"""The page's server: what it answers, what it refuses in which words, and that nobody takes it down."""

import asyncio
import contextlib
import http.client
import importlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tinyvit import VisionTransformer, load_pretrained, reference
from tinyvit.commands import main
from tinyvit.data import load_mnist
from tinyvit.evaluate import attention_rollout
from tinyvit.model import ViTConfig, initialise
from tinyvit.pretrained import pretrained_card
from tinyvit.pretrained.pictures import prepare_strokes

pytestmark = pytest.mark.extended

for needed in ("fastapi", "uvicorn"):
    pytest.importorskip(needed, reason=f"the page needs {needed}: pip install -e '.[app,app-test]'")
uvicorn = importlib.import_module("uvicorn")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
app_module, guard, reader, listen, serve_command, serve = (
    importlib.import_module(name)
    for name in (
        "tinyvit.server.app",
        "tinyvit.server.guard",
        "tinyvit.server.reader",
        "tinyvit.server.listen",
        "tinyvit.commands.serve",
        "serve",
    )
)

SMALL = ViTConfig(width=16, depth=2, heads=2, mlp_width=24)
STROKES, PIXELS = "/api/predict/strokes", "/api/predict/pixels"
JSON = {"content-type": "application/json"}


class Live:
    """A server in a thread, and what one asks of it."""

    def __init__(self, app, protocol=guard.PatientProtocol):
        self.listener = listen.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(
            app, http=protocol, ws="none", log_level="critical", access_log=False, timeout_keep_alive=5
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()
        assert not self.thread.is_alive()

    def ask(self, path, body=None, method=None, headers=JSON):
        """Return the status, the headers and the body of an answer; a body that is no bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def connect(self):
        """Return a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def works(self):
        return self.ask(STROKES, {"strokes": serve.drawing(3)})[0] == 200


@contextlib.contextmanager
def live(app, protocol=guard.PatientProtocol):
    server = Live(app, protocol)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def model():
    return load_pretrained()


@pytest.fixture(scope="module")
def server(model):
    card = pretrained_card()
    samples = app_module.choose_samples(load_mnist(), card.misread, card.barely_read)
    with live(app_module.create_app(model, "a model", card.test_accuracy, samples)) as server:
        yield server


def small_model():
    return VisionTransformer(SMALL, initialise(SMALL))


def everything(connection):
    """Return what a bare connection still gives before it ends."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


# ---- what is answered ----


@pytest.mark.parametrize("digit", range(10))
def test_drawn_digits_are_read(server, digit):
    status, _, body = server.ask(STROKES, {"strokes": serve.drawing(digit)})
    answer = json.loads(body)
    assert (status, answer["digit"]) == (200, digit)
    app_module.Reading.model_validate(answer)
    assert set(answer) == set(app_module.Reading.model_fields)


def test_an_answer_is_what_the_library_says(server, model):
    images = load_mnist().test_images[:6]
    for image in images:
        answer = json.loads(server.ask(PIXELS, {"pixels": image.tolist()})[2])
        assert answer["pixels"] == image.tolist()
        assert answer["frame"] == {"left": 0, "top": 0, "side": 1}
        np.testing.assert_allclose(answer["probabilities"], model.predict_proba(image[None])[0], atol=2e-5)
        expected = attention_rollout(image[None], model.parameters, model.config)[0]
        np.testing.assert_allclose(answer["rollout"], expected, atol=2e-5)
        attention = np.array(answer["attention"])
        assert attention.shape == (4, 4, 17)
        np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=2e-4)


def test_the_attention_is_that_of_the_class_token_in_the_layer_and_head_that_it_says(server, model):
    """Computed by the plain model from the tokens that enter each block."""
    image, weights, config = load_mnist().test_images[3], model.parameters, model.config
    answer = json.loads(server.ask(PIXELS, {"pixels": image.tolist()})[2])
    x, _ = reference.patch_embedding_forward(
        images=image[None] / 255,
        w=weights["patch_embedding.weight"],
        b=weights["patch_embedding.bias"],
        class_token=weights["class_token"],
        positions=weights["positions"],
        patch_size=config.patch_size,
    )
    for layer in range(config.depth):
        normed, _ = reference.layer_norm_forward(x, *weights.pair(f"blocks.{layer}.norm1"))
        qkv, _ = reference.linear_forward(normed, *weights.pair(f"blocks.{layer}.attention.qkv"))
        q, k, _ = (reference.split_heads(part, config.heads) for part in np.split(qkv, 3, axis=-1))
        shares, _ = reference.attention_forward(q[:, :, :1], k, np.eye(config.tokens))  # the weights themselves
        np.testing.assert_allclose(answer["attention"][layer], shares[0, :, 0], atol=1e-4)
        x, _ = reference.block_forward(x, weights, f"blocks.{layer}", config.heads)


def test_strokes_are_prepared_as_the_library_does_it(server):
    strokes = serve.drawing(8)
    answer = json.loads(server.ask(STROKES, {"strokes": strokes})[2])
    prepared = prepare_strokes(strokes)
    assert answer["pixels"] == prepared.image.tolist()
    assert list(answer["frame"].values()) == pytest.approx(prepared.frame, abs=1e-4)


def test_the_model_and_the_samples_are_described(server):
    about = json.loads(server.ask("/api/model")[2])
    assert about["parameters"] == 803_338
    assert (about["layers"], about["heads"], about["patches_per_side"]) == (4, 4, 4)
    assert about["class_names"] == list("0123456789")
    assert about["test_accuracy"] == pretrained_card().test_accuracy
    samples = json.loads(server.ask("/api/samples")[2])
    data = load_mnist()
    for sample in samples:
        assert data.test_images[sample["index"]].tolist() == sample["pixels"]
        assert data.test_labels[sample["index"]] == sample["label"]
    wrong = [
        json.loads(server.ask(PIXELS, {"pixels": sample["pixels"]})[2])["digit"] != sample["label"]
        for sample in samples
    ]
    assert wrong == [sample["kind"] == "misread" for sample in samples]
    assert sorted(sample["label"] for sample in samples if sample["kind"] == "plain") == list(range(10))
    assert sum(wrong) == 5


def test_a_model_of_another_form_is_served_as_well():
    with live(app_module.create_app(small_model())) as server:
        answer = json.loads(server.ask(STROKES, {"strokes": serve.drawing(1)})[2])
        assert np.array(answer["attention"]).shape == (2, 2, 17)
        about = json.loads(server.ask("/api/model")[2])
        assert (about["layers"], about["test_accuracy"]) == (2, None)


def test_many_at_once_get_the_answers_of_one_alone(model):
    """Forty wait while the model is held back, then are read in batches of eight: each gets its own answer."""
    drawings = [serve.drawing(i % 10, np.random.default_rng(i)) for i in range(40)]
    sizes, hold = [], threading.Event()

    async def ask_all():
        async with reader.Reader(model, most_at_once=8, most_waiting=41) as busy:
            blocked = asyncio.create_task(busy.read(lambda: hold.wait(30) and prepare_strokes(drawings[0])))
            await asyncio.sleep(0.05)
            tasks = [asyncio.create_task(busy.read(lambda d=d: prepare_strokes(d))) for d in drawings]
            await asyncio.sleep(0.05)
            hold.set()
            await blocked
            return await asyncio.gather(*tasks)

    read_batch = reader.read_batch

    def counted(model, preparations):
        sizes.append(len(preparations))
        return read_batch(model, preparations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read_batch", counted)
        together = asyncio.run(ask_all())
    assert sizes == [1, 8, 8, 8, 8, 8]
    for strokes, answer in zip(drawings, together, strict=True):
        (alone,) = read_batch(model, [lambda strokes=strokes: prepare_strokes(strokes)])
        one, other = json.loads(answer), json.loads(alone)
        assert one["pixels"] == other["pixels"]
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-4)


# ---- what is refused ----

ROW = [0] * 28
GRID = [ROW] * 28
POINT = [0.5, 0.5]


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        (STROKES, b"", 422, "the body"),
        (STROKES, b"no JSON", 400, "the body is not JSON"),
        (STROKES, b'{"strokes": [[[0.1, 0.2]]]', 400, "the body is not JSON"),
        (STROKES, b"\xff\xfe\x00", 400, "the body"),
        (STROKES, b'{"strokes": [[[NaN, 0.2]]]}', 422, "strokes.0.0.0: Input should be a finite number"),
        (STROKES, b'{"strokes": [[[-Infinity, 0.2]]]}', 422, "strokes.0.0.0"),
        (STROKES, b'{"strokes": [[[1e999, 0.2]]]}', 422, "strokes.0.0.0"),
        (STROKES, b'{"strokes": [[[1' + b"0" * 5000 + b", 0.2]]]}", 4, ""),
        (STROKES, b"[" * 60_000, 400, ""),
        (STROKES, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 4, ""),
        (STROKES, {"strokes": []}, 422, "strokes: List should have at least 1 item"),
        (STROKES, {"strokes": [[]]}, 422, "strokes.0: List should have at least 1 item"),
        (STROKES, {"strokes": [[[0.1]]]}, 422, "strokes.0.0: List should have at least 2 items"),
        (STROKES, {"strokes": [[[0.1, 0.2, 0.3]]]}, 422, "strokes.0.0: List should have at most 2 items"),
        (STROKES, {"strokes": [[["0.1", 0.2]]]}, 422, "strokes.0.0.0: Input should be a valid number"),
        (STROKES, {"strokes": [[[True, 0.2]]]}, 422, "strokes.0.0.0: Input should be a valid number"),
        (STROKES, {"strokes": [[[None, 0.2]]]}, 422, "strokes.0.0.0: Input should be a valid number"),
        (STROKES, {"strokes": [[{"x": 0.1, "y": 0.2}]]}, 422, "strokes.0.0: Input should be a valid list"),
        (STROKES, {"strokes": [[[0.1, 1.5]]]}, 422, "strokes.0.0.1: Input should be less than or equal to 1"),
        (STROKES, {"strokes": [[POINT]] * 101}, 422, "strokes: List should have at most 100 items"),
        (STROKES, {"strokes": [[POINT] * 2001]}, 422, "strokes.0: List should have at most 2000 items"),
        (STROKES, {"strokes": [[POINT]], "pen": 3}, 422, "pen: Extra inputs are not permitted"),
        (STROKES, {}, 422, "strokes: Field required"),
        (STROKES, [1], 422, "the body"),
        (STROKES, None, 405, "Method Not Allowed"),
        (PIXELS, {"pixels": GRID[1:]}, 422, "pixels: List should have at least 28 items"),
        (PIXELS, {"pixels": [[*ROW, 0], *GRID[1:]]}, 422, "pixels.0: List should have at most 28 items"),
        (PIXELS, {"pixels": [[256, *ROW[1:]], *GRID[1:]]}, 422, "pixels.0.0: Input should be less than or equal"),
        (PIXELS, {"pixels": [[-1, *ROW[1:]], *GRID[1:]]}, 422, "pixels.0.0: Input should be greater than or equal"),
        (PIXELS, {"pixels": [[0.5, *ROW[1:]], *GRID[1:]]}, 422, "pixels.0.0: Input should be a valid integer"),
        (PIXELS, {"pixels": [[10**30, *ROW[1:]], *GRID[1:]]}, 422, "pixels.0.0: Input should be"),
        (PIXELS, {"pixels": "no picture"}, 422, "pixels: Input should be a valid list"),
        (PIXELS, {"pixels": [["x"] * 28] * 28}, 422, "pixels.0.0: Input should be a valid integer"),
        (STROKES, {"strokes": [[[]] * 2000] * 8}, 422, "strokes.0.0: List should have at least 2 items"),
        (STROKES, {"strokes": 1, "a": 2, "b": 3}, 422, "strokes: Input should be a valid list (and 2 more)"),
        ("/api/nothing", None, 404, "Not Found"),
        ("/api/predict", {"strokes": [[POINT]]}, 404, "Not Found"),
    ],
)
def test_what_is_wrong_gets_its_status_and_a_sentence(server, path, body, status, expected):
    if body is None and status == 405:
        found, headers, text = server.ask(path, method="GET")
        assert headers["allow"] == "POST"
    else:
        found, headers, text = server.ask(path, body)
    assert found == status or found // 100 == status  # where either of two is right
    detail = json.loads(text)["detail"]
    assert expected in detail
    assert len(detail) < 200
    assert "\n" not in detail
    assert "content-security-policy" in headers
    assert server.works()


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_content_type_is_named(server, kind):
    body = json.dumps({"strokes": [[POINT]]}).encode()
    status, _, text = server.ask(STROKES, body, headers={"content-type": kind})
    assert status == 415
    assert "expected the content-type application/json" in json.loads(text)["detail"]


def test_a_whole_number_may_be_written_with_a_point(server):
    pixels = load_mnist().test_images[0].tolist()
    body = json.dumps({"pixels": [[float(level) for level in row] for row in pixels]})
    assert ".0," in body
    assert json.loads(server.ask(PIXELS, body.encode())[2])["pixels"] == pixels


def test_a_charset_beside_the_content_type_is_fine(server):
    body = {"strokes": serve.drawing(2)}
    assert server.ask(STROKES, body, headers={"content-type": "application/json; charset=utf-8"})[0] == 200


def chunks(parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


HEAD = b"POST /api/predict/strokes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LARGE = b'{"strokes": ' + b" " * 70_000 + b"[[[0.5,0.5]]]}"


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"content-length: %d\r\n\r\n" % len(LARGE) + LARGE,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks([LARGE[i : i + 999] for i in range(0, 70_000, 999)]),
        HEAD + b"content-length: 999999999999\r\nexpect: 100-continue\r\n\r\n",
    ],
    ids=["announced", "chunked", "asking first"],
)
def test_a_large_body_is_refused(server, request_bytes):
    with server.connect() as connection:
        connection.sendall(request_bytes)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"more than 65,536 bytes" in answer
    assert b"connection: close" in answer.lower()
    assert server.works()


def test_a_body_without_end_is_refused_and_not_kept(server):
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        part = chunks([b"x" * 65_536]).removesuffix(b"0\r\n\r\n")
        for _ in range(1000):  # 64 MiB, of which the server reads eight
            connection.sendall(part)
        pytest.fail("the server took 64 MiB")
    assert server.works()


def test_small_chunks_make_a_whole_body(server):
    body = json.dumps({"strokes": serve.drawing(7)}).encode()
    with server.connect() as connection:
        connection.sendall(HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.sendall(chunks([body[i : i + 3] for i in range(0, len(body), 3)]))
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'{"digit":7,' in answer


def test_the_largest_drawing_that_is_taken_is_read(server):
    rng = np.random.default_rng(0)
    strokes = rng.random((100, 40, 2)).round(4).tolist()
    body = json.dumps({"strokes": strokes}, separators=(",", ":")).encode()
    assert 60_000 < len(body) < guard.MOST_BYTES + 4000
    strokes = strokes[:90]
    began = time.perf_counter()
    status, _, _ = server.ask(STROKES, {"strokes": strokes})
    assert status == 200
    assert time.perf_counter() - began < 5


# ---- the file system, and what the browser may do ----


@pytest.mark.parametrize(
    "path",
    [
        "/../setup.cfg", "/..%2f..%2fsetup.cfg", "/%2e%2e/%2e%2e/setup.cfg", "/....//setup.cfg", "/app.py",
        "/page/app.js", "/index.html", "//etc/passwd", "/etc/passwd", "/app.js/..", "/app.js%00", "/static/app.js",
        "/%5c..%5capp.py", "/docs", "/redoc", "/.git/config", "/__init__.py",
    ],
)  # fmt: skip
def test_no_path_reaches_a_file(server, path):
    with server.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert b"root:" not in answer


def test_no_file_is_opened_once_the_server_has_started(model, monkeypatch):
    with live(app_module.create_app(model)) as server:
        opened = []
        real = open

        def watched(file, *arguments, **options):
            opened.append(file)
            return real(file, *arguments, **options)

        monkeypatch.setattr("builtins.open", watched)
        monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path))
        for path in app_module.FILES:
            assert server.ask(path)[0] == 200
        assert server.works()
        assert server.ask("/setup.cfg")[0] == 404
        assert opened == []


@pytest.mark.parametrize("path", [*app_module.FILES, "/api/model", "/openapi.json", "/nothing"])
def test_every_answer_keeps_the_page_to_itself(server, path):
    _, headers, _ = server.ask(path)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere():
    for file, _ in app_module.FILES.values():
        text = (app_module.PAGE / file).read_text()
        addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
        allowed = ("http://127.0.0.1:8000", "http://www.w3.org/2000/svg")
        assert all(address.startswith(allowed) for address in addresses), addresses
        if file.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|\son\w+=|<style", text), file
    assert {path.name for path in app_module.PAGE.iterdir()} == {file for file, _ in app_module.FILES.values()}


def test_the_api_is_described_in_words_and_in_openapi(server):
    described = json.loads(server.ask("/openapi.json")[2])
    words = server.ask("/api")[2].decode()
    assert set(described["paths"]) == {STROKES, PIXELS, "/api/model", "/api/samples"}
    for path, methods in described["paths"].items():
        assert path in words
        for method in methods.values():
            assert method["summary"]
    assert set(described["paths"][STROKES]["post"]["responses"]) == {
        "200", "400", "408", "413", "415", "422", "503",
    }  # fmt: skip
    for status in ("400", "408", "413", "415", "422", "503"):
        assert status in words


def test_the_commands_in_the_words_work(server, tmp_path):
    words = server.ask("/api")[2].decode().replace("&lt;", "<")
    strokes = re.search(r"-d '(\{.*?\})'", words)[1]
    assert json.loads(server.ask(STROKES, strokes.encode())[2])["digit"] == 7
    program = re.search(r"python - <<'END'\n(.*?)\nEND", words, re.DOTALL)[1]
    program = program.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "7\n", done.stderr


# ---- floods and slow clients ----


class Impatient(guard.PatientProtocol):
    header_seconds, exchange_seconds, most_connections = 1.0, 4.0, 5


@pytest.fixture
def impatient(monkeypatch):
    """A server that waits for less long, and takes fewer connections."""
    monkeypatch.setattr(guard.Guard.__init__, "__defaults__", (guard.MOST_BYTES, 0.5))
    with live(app_module.create_app(small_model(), most_waiting=2), Impatient) as server:
        yield server


def soon(condition):
    """Wait until it holds, for a while, and return whether it does."""
    deadline = time.monotonic() + 15
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_headers_that_do_not_come_in_time(impatient):
    for begin in (b"", b"G", b"POST / HTTP/1.1\r\nhost: x\r\n"):
        with impatient.connect() as connection:
            began = time.monotonic()
            connection.sendall(begin)
            answer = everything(connection)
            assert 0.2 < time.monotonic() - began < 5
            assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert "headers did not arrive" in json.loads(answer.split(b"\r\n\r\n")[1])["detail"]
    assert impatient.works()


def test_headers_a_byte_at_a_time_do_not_hold_the_server(impatient):
    with impatient.connect() as connection:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in HEAD * 50:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() - began > 8:
                    pytest.fail("the server still listens")
    assert impatient.works()


def test_a_second_request_has_its_time_too(impatient):
    with impatient.connect() as connection:
        for _ in range(2):
            connection.sendall(b"GET /api/model HTTP/1.1\r\nhost: x\r\n\r\n")
            found = b""
            while b"body_bytes" not in found:
                part = connection.recv(65536)
                assert part
                found += part
            time.sleep(1.2)  # longer than headers may take, which is no matter between two requests
        connection.sendall(b"GET /api")
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("announced", [b"content-length: 100", b"transfer-encoding: chunked"])
def test_a_body_that_does_not_come_in_time(impatient, announced):
    with impatient.connect() as connection:
        connection.sendall(HEAD + announced + b"\r\n\r\n")
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.5 seconds" in answer
    assert impatient.works()


def test_a_client_that_does_not_read_is_let_go(impatient):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", impatient.port))
        connection.settimeout(0.2)
        with contextlib.suppress(OSError):  # requests without end, of which no answer is read
            for _ in range(20_000):
                connection.sendall(b"GET /app.js HTTP/1.1\r\nhost: x\r\n\r\n" * 10)
        deadline = time.monotonic() + 15
        while impatient.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not impatient.server.server_state.connections
    assert impatient.works()


def test_more_connections_than_may_be_are_told_so(impatient, monkeypatch):
    monkeypatch.setattr(Impatient, "header_seconds", 30)
    connections = impatient.server.server_state.connections
    with contextlib.ExitStack() as stack:
        for _ in range(Impatient.most_connections):
            stack.enter_context(impatient.connect())
        assert soon(lambda: len(connections) == Impatient.most_connections)
        connection = stack.enter_context(impatient.connect())
        answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
    assert soon(lambda: not connections)
    assert impatient.works()


def test_requests_far_ahead_of_their_answers_are_not_kept(impatient):
    """Who sends on and on and reads: uvicorn would keep all that it has not come to."""
    with impatient.connect() as connection:
        connection.setblocking(False)
        sent, request = 0, b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n" * 2000
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 100_000_000:
                readable, writable, _ = select.select([connection], [connection], [], 10)
                if readable and not connection.recv(1 << 20):
                    break
                if writable:
                    sent += connection.send(request)
        assert sent < 100_000_000
    assert impatient.works()


def test_who_has_waited_too_long_is_told_so_and_not_read(monkeypatch):
    hold, calls = threading.Event(), []
    prepare = prepare_strokes

    def slow(strokes):
        calls.append(strokes)
        hold.wait(30)
        return prepare(strokes)

    monkeypatch.setattr(app_module, "prepare_strokes", slow)
    monkeypatch.setattr(reader, "MOST_SECONDS", 1.0)
    with live(app_module.create_app(small_model(), most_at_once=1)) as server:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(server.ask(STROKES, {"strokes": [[POINT]]})))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert [status for status, _, _ in results] == [503] * 3
        hold.set()
        monkeypatch.setattr(reader, "MOST_SECONDS", 20.0)
        assert server.works()
        assert len(calls) == 2  # the one that was at work, and the last


def test_a_flood_is_told_when_to_come_again(monkeypatch):
    hold, working = threading.Event(), threading.Event()
    prepare = prepare_strokes

    def slow(strokes):
        working.set()
        hold.wait(30)
        return prepare(strokes)

    monkeypatch.setattr(app_module, "prepare_strokes", slow)
    monkeypatch.setattr(reader, "MOST_SECONDS", 60.0)
    with live(app_module.create_app(small_model(), most_at_once=1, most_waiting=3)) as server:
        results = []

        def ask():
            results.append(server.ask(STROKES, {"strokes": [[POINT]]}))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        threads[0].start()
        assert working.wait(20)
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 20
        while len(results) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [status for status, _, _ in results] == [503] * 8  # one is at work, three wait
        for _, headers, body in results:
            assert headers["retry-after"] == "1"
            assert "try again" in json.loads(body)["detail"]
        assert server.ask("/api/model")[0] == 200  # the rest of the server is not held up
        hold.set()
        for thread in threads:
            thread.join(20)
        assert sorted(status for status, _, _ in results) == [200] * 4 + [503] * 8
        assert server.works()


def test_who_leaves_while_waiting_takes_nobody_along(monkeypatch):
    hold = threading.Event()
    prepare = prepare_strokes

    def slow(strokes):
        hold.wait(30)
        return prepare(strokes)

    monkeypatch.setattr(app_module, "prepare_strokes", slow)
    with live(app_module.create_app(small_model(), most_at_once=4)) as server:
        body = json.dumps({"strokes": [[POINT]]}).encode()
        for _ in range(20):
            with server.connect() as connection:
                connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        hold.set()
        assert server.works()


def test_a_defect_in_one_drawing_leaves_the_others_of_its_batch_alone(model):
    def broken():
        raise RuntimeError("a defect")

    def sound():
        return prepare_strokes(serve.drawing(3))

    one, other, third = reader.read_batch(model, [sound, broken, sound])
    assert isinstance(other, RuntimeError)
    assert json.loads(one)["digit"] == json.loads(third)["digit"] == 3


def test_a_defect_in_one_answer_is_a_500_and_the_next_one_is_right(monkeypatch):
    def broken(strokes):
        raise RuntimeError("a defect")

    prepare = app_module.prepare_strokes
    with live(app_module.create_app(small_model())) as server:
        monkeypatch.setattr(app_module, "prepare_strokes", broken)
        status, _, text = server.ask(STROKES, {"strokes": [[POINT]]})
        assert status == 500
        assert b"defect" not in text
        monkeypatch.setattr(app_module, "prepare_strokes", prepare)
        assert server.works()


def test_stopping_the_server_leaves_nobody_waiting(model):
    hold = threading.Event()

    async def stop_while_waiting():
        async with reader.Reader(model, most_at_once=1) as busy:
            wait = lambda: hold.wait(30) and prepare_strokes([[POINT]])  # noqa: E731
            tasks = [asyncio.create_task(busy.read(wait)) for _ in "123"]
            await asyncio.sleep(0.1)
            threading.Timer(0.2, hold.set).start()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    results = asyncio.run(stop_while_waiting())
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


def test_nonsense_instead_of_http_gets_a_400(server):
    tls, version = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n", b"GET / HTTP/9.9\r\n\r\n"
    for nonsense in (tls, b"hello\r\n\r\n", version, b"\0" * 100_000):
        with server.connect() as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            assert everything(connection)[:13] in (b"HTTP/1.1 400 ", b"")
    assert server.works()


# ---- the command ----


@pytest.fixture
def command():
    """Start the command, and end it whatever happens."""
    processes = []

    def start(*arguments, cwd=ROOT):
        path = [sys.executable, "-m", "tinyvit", "serve", *arguments]
        process = subprocess.Popen(path, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_on_loopback_until_it_is_told_to_stop(command, number):
    process = command("--no-browser", "--port", "0")
    line = process.stdout.readline()
    port = int(re.fullmatch(r"the page is at http://127\.0\.0\.1:(\d+), and Ctrl-C stops the server\n", line)[1])
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert b"Draw a digit" in answer.read()
        assert answer.headers["server"] is None
    try:
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
    except socket.gaierror:  # a name that leads nowhere
        others = set()
    for other in others:  # only this computer reaches it
        with pytest.raises(OSError):  # noqa: PT011
            socket.create_connection((other, port), timeout=2)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, err) == ("", "")
    assert process.returncode == 0


def test_a_port_that_is_taken_is_said(capsys):
    with listen.listen("127.0.0.1", 0) as listener:
        listener.listen()
        port = str(listener.getsockname()[1])
        assert main(["serve", "--no-browser", "--port", port]) == 2
    error = capsys.readouterr().err
    assert error == f"error: cannot listen on 127.0.0.1, port {port} (Address already in use): " \
        "give another --port, or 0 for any free port\n"  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "256.1.1.1"], "error: cannot listen on 256.1.1.1"),
        (["--host", "192.0.2.1"], "error: cannot listen on 192.0.2.1"),
        (["--model", "nowhere.safetensors"], "error: nowhere.safetensors: no such file or folder: give a model file"),
    ],
)
def test_what_cannot_be_served_is_said(capsys, arguments, expected):
    assert main(["serve", "--no-browser", "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(expected)
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--port 70000", "--port -1", "--batch 0", "--queue 0", "--prot 8000"])
def test_a_flag_that_cannot_be_is_said(capsys, arguments):
    try:
        status = main(["serve", *arguments.split()])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert "error: " in capsys.readouterr().err


def test_a_model_for_other_pictures_is_refused(tmp_path, capsys):
    config = ViTConfig(image_size=20, patch_size=5, width=16, depth=1, heads=2, mlp_width=8)
    VisionTransformer(config, initialise(config)).save(tmp_path / "m.safetensors")
    assert main(["serve", "--no-browser", "--model", str(tmp_path / "m.safetensors")]) == 2
    assert "expected a model for 28 x 28 pixels and 10 classes, found 20 x 20" in capsys.readouterr().err


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    for name in ("tinyvit.server.app", "tinyvit.server.guard"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == (
        "error: the server needs fastapi, which is not installed: type 'pip install -e \".[app]\"'\n"
    )


def test_the_address_can_be_opened():
    for host, expected in (("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")):
        with listen.listen(host, 0) as listener:
            assert listen.address_of(listener).startswith(expected)


def test_answers_do_not_wait_for_nagle():
    """A socket without its protocol's number keeps Nagle's algorithm, and every answer comes 40 ms late."""
    with listen.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_browser_is_opened_when_the_socket_listens(monkeypatch):
    opened = threading.Event()
    monkeypatch.setattr(serve_command.webbrowser, "open", lambda address: opened.set())

    def serve(app, listener):
        assert opened.wait(5)
        socket.create_connection(listener.getsockname(), timeout=5).close()

    monkeypatch.setattr(listen, "serve", serve)
    assert main(["serve", "--port", "0"]) == 0
    assert opened.is_set()


# ---- the API against its own description ----


@pytest.fixture(scope="module")
def described(server):
    schemathesis = pytest.importorskip("schemathesis", reason="pip install -e '.[app-test]'")
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def test_the_api_keeps_to_its_description(described, server):
    """schemathesis draws requests, right and wrong ones; every answer must be of a status and a form that is said."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode

    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 4
    seen = []
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                response = case.call_and_validate()
                seen.append((case.operation.path, response.status_code))

            check()
    assert {(STROKES, 200), (PIXELS, 200), ("/api/model", 200), ("/api/samples", 200)} <= set(seen)
    assert {(STROKES, 422), (PIXELS, 422)} <= set(seen)
    assert all(status < 500 for _, status in seen)
    assert server.works()
