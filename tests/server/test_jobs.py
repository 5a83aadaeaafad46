"""The queue: what was asked for is done once, whatever is killed, and nothing of it is lost."""

import asyncio
import os
import random
import signal
import time
from contextlib import suppress

import httpx
import mlx.core as mx
import numpy as np
import pytest

from flux.server.jobs import Jobs, New
from flux.server.problems import Problem
from flux.training.report import read_lines

from .serving import TINY, processes_of, write_dataset

ITERATIONS = 12
LONG = {"iterations": ITERATIONS, "learning_rate": 1e-2, "state_every": 1, **TINY}
KILLS = int(os.environ.get("FLUX_TEST_KILLS", "3"))  # 20 for a night


def arrays(folder) -> dict[str, bytes]:
    (path,) = folder.glob(f"{folder.name}.safetensors")
    return {name: np.array(array).tobytes() for name, array in mx.load(str(path)).items()}


def iterations(folder) -> list[int]:
    return [line["iteration"] for line in read_lines(folder / "events.jsonl") if line["event"] == "update"]


def wait_for_iteration(server, id: str, iteration: int) -> None:
    while (server.job(id)["iteration"] or 0) < iteration:
        assert server.job(id)["state"] in ("queued", "running"), server.job(id)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(server) -> dict[str, bytes]:
    """The adapter of a run that nobody stops. Many ask for its status meanwhile."""
    write_dataset(server, "straight", 2)
    id = server.ok("/train", output_name="straight", id="straight-1", **LONG)["run_id"]
    asyncio.run(many_statuses(str(server.http.base_url), id))
    server.wait(id, "done")
    return arrays(server.root / "outputs/straight")


async def many_statuses(address: str, id: str) -> None:
    """200 at once: every one is answered."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits, trust_env=False) as client:
        answers = await asyncio.gather(*(client.get(f"/status/{id}") for _ in range(200)))
    assert [answer.status_code for answer in answers] == [200] * 200
    assert {answer.json()["run_id"] for answer in answers} == {id}


def test_an_id_stands_for_one_request(server, straight):
    body = {"output_name": "straight", "id": "straight-1", **LONG}
    assert server.ok("/train", **body)["run_id"] == "straight-1"
    assert server.job("straight-1")["state"] == "done"
    answer = server.post("/train", **body | {"iterations": 3})
    assert answer.status_code == 409
    assert "another request" in answer.json()["detail"]


def test_cancel_and_resume_to_the_bit(server, straight):
    write_dataset(server, "cancelled", 2)
    write_dataset(server, "next", 2)
    first = server.ok("/train", output_name="cancelled", dataset="straight", **LONG)["run_id"]
    second = server.ok("/train", output_name="next", iterations=1, **TINY)["run_id"]
    third = server.ok("/jobs", kind="caption", request={"output_name": "next"})["id"]
    assert server.post("/train", output_name="cancelled", **LONG).status_code == 409
    assert server.ok(f"/jobs/{third}/cancel")["state"] == "cancelled"
    wait_for_iteration(server, first, 3)
    options = server.root / f"logs/{first}.options.json"
    assert processes_of(options)
    server.ok(f"/jobs/{first}/cancel")
    server.wait(first, "cancelled", seconds=2)
    assert not processes_of(options)  # its memory is free
    assert server.post(f"/jobs/{first}/cancel").status_code == 409
    server.wait(second, "done")
    assert server.post(f"/jobs/{second}/resume").status_code == 409
    refused = server.post("/train", output_name="cancelled", dataset="straight", **LONG)
    assert refused.status_code == 409
    assert "resume" in refused.json()["detail"]
    server.ok(f"/jobs/{first}/resume")
    server.wait(first, "done")
    assert arrays(server.root / "outputs/cancelled") == straight
    assert iterations(server.root / "outputs/cancelled") == list(range(1, ITERATIONS + 1))


def test_a_finished_run_is_kept_beside_a_new_one(server):
    """Its states are older than the new job: that does not go on from them."""
    write_dataset(server, "again", 1)
    body = {"output_name": "again", "iterations": 1, **TINY}
    for _ in range(2):
        server.wait(server.ok("/train", **body)["run_id"], "done")
    assert (server.root / "outputs/again.1/again.safetensors").is_file()
    assert (server.root / "outputs/again/again.safetensors").is_file()


def test_kills_at_random_moments(server, straight):
    """Server, worker and program: any of them, or all. Nothing is lost and nothing is done twice."""
    random.seed(KILLS)
    id = server.ok("/train", output_name="killed", dataset="straight", **LONG)["run_id"]
    other = server.ok("/jobs", kind="caption", request={"output_name": "straight", "id": "after"})["id"]
    for _ in range(KILLS):
        time.sleep(random.uniform(0.2, 3.0))
        victims = processes_of(server.root)
        for pid in random.choice([victims, victims[:1], []]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.kill()
        server.start()
        assert server.job(id)["state"] in ("queued", "running", "done")
    server.wait(id, "done")
    server.wait(other, "done")
    assert arrays(server.root / "outputs/killed") == straight
    assert iterations(server.root / "outputs/killed") == list(range(1, ITERATIONS + 1))
    assert not list((server.root / "outputs").glob("killed.*"))


def test_a_failed_job_says_why(server):
    write_dataset(server, "empty", 1)
    (server.root / "datasets/empty/image0.png").write_bytes(b"broken")
    id = server.ok("/train", output_name="empty", **TINY)["run_id"]
    while (job := server.job(id))["state"] in ("queued", "running"):
        time.sleep(0.05)
    assert job["state"] == "failed"
    assert "image0.png" in job["message"]
    assert not (server.root / "outputs/empty").exists()


def test_the_queue_is_bounded(tmp_path):
    jobs = Jobs(tmp_path)

    def new(number: int) -> New:
        return New("train", f"a{number}", f"id{number}", {}, ("dreambooth",), {})

    for number in range(3):
        jobs.add(new(number), most=3)
    with pytest.raises(Problem) as caught:
        jobs.add(new(3), most=3)
    assert caught.value.status == 429
    assert jobs.add(new(2), most=3).id == "id2"
    assert jobs.get("ID2").id == "id2"  # a disk may not tell them apart
    assert [jobs.next().id, jobs.next().id] == ["id0", "id0"]


def test_a_job_whose_name_another_has_used_is_not_resumed(tmp_path):
    """It would go on from the other's state."""
    jobs = Jobs(tmp_path)
    for id in ("first", "second", "third"):
        jobs.add(New("train", "a", id, {}, ("dreambooth",), {}), most=9)
        if id == "third":  # it has never run
            jobs.cancel(id)
        else:
            jobs.next()
            jobs.end(id, "failed")
    with pytest.raises(Problem, match="the later job second has used the name a"):
        jobs.resume("first")
    assert jobs.resume("second").state == "queued"
