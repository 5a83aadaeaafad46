"""Who may use the server, what leads out of its folders, and what it refuses to fetch."""

import asyncio
import gzip
import io
import socket
import struct
import time
import zlib
from contextlib import suppress

import httpx
import pytest
from PIL import Image

from flux.server import downloads
from flux.server.downloads import CheckedTransport, download, is_public
from flux.server.folders import Folders
from flux.server.problems import Problem
from flux.server.settings import Settings

from .serving import Process, picture_server, png


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a token, which downloads from public addresses alone."""
    process = Process(tmp_path_factory.mktemp("guarded"), "--token", "s3cret", "--allow-host", "box.lan")
    process.http.headers["Authorization"] = "Bearer s3cret"
    yield process
    process.stop()


# --- Requests ---


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic s3cret"}, 401),
        ({"Host": "evil.example"}, 400),
        ({"Host": "localhost.evil.example"}, 400),
        ({"Host": "box.lan:8000"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": ""}, 400),
        ({"Origin": "http://evil.example"}, 400),
        ({"Origin": "null"}, 400),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 400),
    ],
)
def test_host_origin_and_token(guarded, headers, status):
    answer = guarded.http.get("/jobs", headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert set(answer.json()) == {"detail", "error"}
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_page_of_the_server_itself_may(guarded):
    address = str(guarded.http.base_url)
    assert guarded.http.get("/jobs", headers={"Origin": address}).status_code == 200


def test_health_needs_no_token(guarded):
    assert guarded.http.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_bodies_are_bounded(guarded, is_chunked):
    size = 65 * 2**20
    content = (b" " * 2**20 for _ in range(65)) if is_chunked else b" " * size
    try:
        status = guarded.http.post("/train", content=content).status_code
    except (httpx.WriteError, httpx.ReadError):  # it was cut off while it sent
        return
    assert status == 413


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b'{"urls": NaN', b"\xff\xfe"])
def test_what_is_no_json(guarded, content):
    answer = guarded.http.post("/train", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text


# --- Names ---


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a/b", "a\\b", "..", ".hidden", "", "a\0b", "x" * 101, "a.toml"]
)
def test_names(tmp_path, name):
    folders = Folders(tmp_path)
    folders.make()
    for path in (folders.dataset, folders.config, folders.output, folders.log):
        with pytest.raises(Problem, match="is not a name"):
            path(name)


def test_links_lead_nowhere(guarded):
    outside = guarded.folder / "outside"
    outside.mkdir()
    (outside / "image.png").write_bytes(png())
    (guarded.root / "datasets/linked").symlink_to(outside)
    (guarded.root / "outputs/run").mkdir()
    (guarded.root / "outputs/run/run.safetensors").symlink_to("/etc/passwd")
    assert "linked" not in [each["name"] for each in guarded.http.get("/datasets").json()]
    for path in (
        "/datasets/linked",
        "/datasets/linked/pictures/image.png",
        "/outputs/run/run.safetensors",
        "/outputs/run/..%2f..%2f..%2foutside%2fimage.png",
        "/outputs/run/%2fetc%2fpasswd",
        "/outputs/..%2f..%2foutside/image.png",
    ):
        answer = guarded.http.get(path)
        assert answer.status_code in (404, 422), path
        assert b"root:" not in answer.content


# --- Downloads ---


def fetch(tmp_path, *urls: str, private: bool = True) -> list[str]:
    return list(asyncio.run(download(urls, tmp_path / "set", private)).values())


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
    "100.64.0.1", "224.0.0.1", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
    "2002:7f00:1::",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(tmp_path, address):
    assert not is_public(address)
    host = f"[{address}]" if ":" in address else address
    (answer,) = fetch(tmp_path, f"http://{host}:1/a.png", private=False)
    assert answer == f"Error: the host {address} has a private, loopback or local address"


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1"])
def test_other_spellings_of_loopback(tmp_path, host):
    (answer,) = fetch(tmp_path, f"http://{host}:1/a.png", private=False)
    assert answer.startswith("Error: ")


def test_public_addresses():
    assert all(map(is_public, ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8")))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a/b.png", "data:image/png;base64,AA", "gopher://a", "a.png"]
)
def test_schemes(tmp_path, url):
    assert fetch(tmp_path, url) == ["Error: only http and https are followed"]


def test_redirects_are_checked_where_they_lead(tmp_path, monkeypatch):
    """The first address is let through, as if it were public."""
    monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.1")

    def to(location: str):
        def answer(handler) -> None:
            handler.send_response(302)
            handler.send_header("Location", location)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return answer

    answers = {
        "/inside": to("http://127.0.0.2:1/x.png"),
        "/file": to("file:///etc/passwd"),
        "/ring": to("/ring"),
        "/relative": to("/x.png"),
        "/x.png": png(),
    }
    with picture_server(answers) as address:
        urls = [f"{address}{path}" for path in answers]
        answer = dict(zip(answers, fetch(tmp_path, *urls, private=False), strict=True))
    assert answer["/inside"] == "Error: the host 127.0.0.2 has a private, loopback or local address"
    assert answer["/file"].startswith("Error: ")
    assert answer["/ring"] == "Error: more than 5 redirects"
    assert answer["/relative"] == str(tmp_path / "set/relative.jpg")
    assert answer["/x.png"] == str(tmp_path / "set/x.jpg")


def test_a_name_is_looked_up_once(monkeypatch):
    """DNS rebinding: public when it is checked, private when it is connected to."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    connected = []

    async def lookup(self, host, port, **kwargs):
        return [(socket.AF_INET, 1, 6, "", (next(answers), port))]

    async def connect(self, request):
        connected.append((request.url.host, request.headers["host"], request.extensions["sni_hostname"]))
        return httpx.Response(200)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lookup)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", connect)

    async def get() -> None:
        async with httpx.AsyncClient(transport=CheckedTransport(False)) as client:
            await client.get("https://rebind.example/a.png")

    asyncio.run(get())
    assert connected == [("93.184.216.34", "rebind.example", "rebind.example")]


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bombs_and_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MOST_BYTES", 2**20)
    monkeypatch.setattr(downloads, "TIMEOUT", 2.0)
    monkeypatch.setattr(downloads, "PICTURE_SECONDS", 4.0)

    def endless(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(bytes(2**16))
        except OSError:
            handler.close_connection = True

    def silent(handler) -> None:
        time.sleep(5)
        handler.close_connection = True

    def drop_by_drop(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            with suppress(OSError):  # it was cut off
                handler.wfile.write(b"\x89")
            time.sleep(0.2)
        handler.close_connection = True

    def zipped(handler) -> None:
        content = gzip.compress(png())
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    answers = {"/bomb": bomb(50_000, 50_000), "/cut": bomb(64, 64), "/endless": endless, "/zipped": zipped}
    answers |= {"/silent": silent, "/slow": drop_by_drop, "/html": b"<html>", "/empty": b""}
    with picture_server(answers) as address:
        found = fetch(tmp_path, *(f"{address}{path}" for path in answers))
    answer = {path: text.removeprefix("Error: ") for path, text in zip(answers, found, strict=True)}
    assert answer["/bomb"] == "the answer is a picture of more than 100 million pixels, or damaged"
    assert answer["/cut"].startswith("cannot read the picture the answer: ")
    assert answer["/endless"] == "the file is larger than 1 MB"
    assert answer["/silent"] == "no answer within 2 s"
    assert answer["/slow"] == "it took too long"
    assert answer["/html"] == answer["/empty"] == answer["/zipped"] == "the answer is not a picture"
    assert not (tmp_path / "set").exists()  # nothing is left of what was refused


def test_the_server_itself_refuses_private_addresses(tmp_path):
    from fastapi.testclient import TestClient

    from flux.server.app import create_app

    with TestClient(create_app(Settings(Folders(tmp_path))), base_url="http://localhost") as client:
        body = {"urls": ["http://127.0.0.1:9/a.png"], "output_name": "x"}
        files = client.post("/download-images", json=body).json()["files"]
    assert files == {body["urls"][0]: "Error: the host 127.0.0.1 has a private, loopback or local address"}


def test_names_of_downloads(tmp_path):
    pictures = {
        "/a/dog.png": png(seed=1),
        "/b/dog.jpeg": png(seed=2),
        "/c/..%2f..%2fup.png": png(),
        "/": png(),
    }
    with picture_server(pictures) as address:
        urls = [f"{address}{path}" for path in pictures]
        first = fetch(tmp_path, *urls)
        again = fetch(tmp_path, urls[1], f"{address}/a/dog.png?2")
    assert [path.removeprefix(f"{tmp_path}/set/") for path in first] == [
        "dog.jpg",
        "dog-2.jpg",
        "up.jpg",
        "image4.jpg",
    ]
    assert [path.removeprefix(f"{tmp_path}/set/") for path in again] == ["dog-2.jpg", "dog-3.jpg"]
    assert Image.open(io.BytesIO((tmp_path / "set/dog.jpg").read_bytes())).format == "JPEG"
