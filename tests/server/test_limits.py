"""What is refused because of what else goes on: 409 and 429, and a model that makes room for a training."""

import errno
import time

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from flux import machine
from flux.outputs import locked
from flux.server import datasets
from flux.server.app import create_app
from flux.server.folders import Folders
from flux.server.jobs import FILE, New
from flux.server.pictures import Painter
from flux.server.problems import Problem
from flux.server.settings import Settings
from flux.server.state import Server

from .serving import png


@pytest.fixture
def app(tmp_path):
    return create_app(Settings(Folders(tmp_path), model="tiny", max_waiting=2, max_queued=1))


@pytest.fixture
def client(app):
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def running(server: Server, said: str) -> None:
    """A training that runs, as far as the queue knows, and what it has printed."""
    server.jobs.add(New("train", "x", "x-1", {}, ("dreambooth",), {}), most=9)
    server.jobs.next()
    server.folders.log("x-1").write_text(said)


def test_room_beside_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 100 * 10**9)
    server = Server(Settings(Folders(tmp_path)))
    assert server.room_now() is None
    running(server, "memory: about 60.00 GB (weights 50.00, adapter 5.00, activations 5.00), 100.0 GB here\n")
    assert server.room_now() == 30 * 10**9
    (server.folders.outputs / "x").mkdir()
    (server.folders.outputs / "x/events.jsonl").write_text(
        '{"event": "update", "peak_memory": 70000000000}\n'
    )
    assert server.room_now() == 20 * 10**9


def test_a_model_that_does_not_fit_beside_a_training(app, client, monkeypatch):
    """It is refused; where it is loaded already, it leaves when the training begins."""
    server = app.state.server
    server.keep_worker = lambda: None
    monkeypatch.setattr(machine, "memory", lambda: 10**9)
    body = {"prompt": "x", "steps": 1}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    assert server.painter.is_loaded
    running(server, "memory: about 0.899 GB (weights 0.5)\n")
    end = time.monotonic() + 10
    while server.painter.is_loaded:
        assert time.monotonic() < end
        time.sleep(0.05)
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 409
    assert "the model tiny needs 0.03 GB, and a training leaves 0.00 GB" in answer.json()["detail"]
    server.jobs.end("x-1", "done")
    assert client.post("/v1/images/generations", json=body).status_code == 200


def test_too_many(app, client, monkeypatch):
    server = app.state.server
    server.keep_worker = lambda: None
    (server.folders.datasets / "a").mkdir()
    (server.folders.datasets / "a.toml").write_text("[general]\n")
    assert client.post("/jobs", json={"kind": "caption", "request": {"output_name": "a"}}).status_code == 201
    answer = client.post("/train", json={"output_name": "a"})
    assert answer.status_code == 429
    assert answer.headers["Retry-After"]
    monkeypatch.setattr(server, "downloading", 4)
    body = {"output_name": "a", "urls": ["http://localhost:1"]}
    assert client.post("/download-images", json=body).status_code == 429


def test_who_has_gone_takes_no_place_in_the_row(tmp_path):
    async def room() -> None:
        return None

    painter = Painter(Settings(Folders(tmp_path), max_waiting=2), room)
    first, _ = painter.order({}, None), painter.order({}, None)
    with pytest.raises(Problem) as caught:
        painter.order({}, None)
    assert caught.value.status == 429
    first.leave()
    painter.order({}, None)
    with pytest.raises(Problem):
        painter.order({}, None)


def test_a_queue_that_is_damaged(app, client):
    """Every request says so, in one sentence; the server goes on, and so does it when the file is whole."""
    path = app.state.server.folders.logs / FILE
    whole = path.read_bytes()
    path.write_bytes(b"damaged" * 1000)
    for answer in (client.get("/jobs"), client.get("/status/x"), client.post("/jobs/x/cancel")):
        assert answer.status_code == 503
        assert "does not work: file is not a database" in answer.json()["detail"]
    with pytest.raises(Problem):
        Server(app.state.server.settings)
    path.write_bytes(whole)
    assert client.get("/jobs").json() == []


def test_a_full_disk(client, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "write_config", full)
    answer = client.post("/create-dataset-config", json={"output_name": "a"})
    assert answer.status_code == 507
    assert answer.json()["detail"] == "the system refuses it: No space left on device"


def test_a_folder_that_is_in_use(app, client):
    folder = app.state.server.folders.datasets / "a"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    with locked(folder):
        answer = client.put("/datasets/a/captions/a.png", json={"caption": "x"})
        assert answer.status_code == 409, answer.text
        body = {"output_name": "a", "urls": ["http://localhost:1"]}
        assert client.post("/download-images", json=body).status_code == 409
    assert client.put("/datasets/a/captions/a.png", json={"caption": "x"}).status_code == 200


def test_a_run_is_deleted(app, client):
    """Not while a job works on it; its name is free then."""
    server = app.state.server
    server.keep_worker = lambda: None
    folder = server.folders.outputs / "x"
    (folder / "states").mkdir(parents=True)
    running(server, "")
    assert client.delete("/outputs/x").status_code == 409
    server.jobs.end("x-1", "cancelled")
    assert client.delete("/outputs/x").json() == {"message": "the files of x are deleted"}
    assert not list(server.folders.outputs.iterdir())
    assert client.delete("/outputs/x").status_code == 404


def test_pictures_are_uploaded(app, client):
    given = [
        ("a.png", png()),
        ("../../a.jpg", png(seed=1)),
        ("b.svg", b"<svg/>"),
        ("\u0430\u2025.png", png()),
    ]
    answer = client.post("/datasets/new/pictures", files=[("files", file) for file in given])
    assert answer.status_code == 200, answer.text
    folder = app.state.server.folders.datasets / "new"
    assert sorted(path.name for path in folder.iterdir()) == ["a-2.jpg", "a.jpg", "image.jpg"]
    assert Image.open(folder / "a.jpg").format == "JPEG"
    files = answer.json()["files"]
    assert files["a.png"] == str(folder / "a.jpg")
    assert files["b.svg"] == "Error: the file is not a picture"
    bad = {"files": ("a.png", b"")}
    assert client.post("/datasets/empty/pictures", files=bad).json()["files"]["a.png"].startswith("Error: ")
    assert not (app.state.server.folders.datasets / "empty").exists()
    assert client.post("/datasets/new/pictures", json={}).status_code == 422
    assert client.post("/datasets/new/pictures", files={"other": ("a.png", png())}).status_code == 422
    assert client.post("/datasets/..%2fx/pictures", files=bad).status_code in (404, 422)


def test_an_unknown_path_and_method(client):
    for answer, status in ((client.get("/nothing"), 404), (client.delete("/train"), 405)):
        assert answer.status_code == status
        assert set(answer.json()) == {"detail", "error"}
