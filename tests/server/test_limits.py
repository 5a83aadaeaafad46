"""What is refused because of what else goes on: 409 and 429, and a model that makes room for a training."""

import time

import pytest
from fastapi.testclient import TestClient

from flux import machine
from flux.outputs import locked
from flux.server.app import create_app
from flux.server.folders import Folders
from flux.server.jobs import New
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
    for _ in range(2):
        server.painter._orders.append(None)  # nobody attends to them: the painter sleeps
    assert client.post("/v1/images/generations", json={"prompt": "x"}).status_code == 429
    server.painter._orders.clear()


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


def test_an_unknown_path_and_method(client):
    for answer, status in ((client.get("/nothing"), 404), (client.delete("/train"), 405)):
        assert answer.status_code == status
        assert set(answer.json()) == {"detail", "error"}
