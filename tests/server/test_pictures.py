"""OpenAI's images API, used by OpenAI's own client over HTTP."""

import base64
import io
import os
import signal
import time

import numpy as np
import openai
import pytest
from PIL import Image

from flux import images
from flux.conditioning import variants
from flux.pipeline import FluxPipeline
from flux.server.generator import Generator, Job

from .. import tiny_pipeline
from .serving import TINY, png, processes_of, write_dataset

FAST = {"steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    """The picture of the script, (2, H, W, 3)."""
    return FluxPipeline("tiny").generate_images("a red apple", n_images=2, seed=7, num_steps=4)


def picture(content: str) -> np.ndarray:
    return images.load(io.BytesIO(base64.b64decode(content)))[0]


def test_a_picture_is_that_of_the_script(server, client, alone):
    answer = client.images.generate(
        prompt="a red apple", model="gpt-image-2", n=2, size="64x64", extra_body=FAST
    )
    assert [picture(each.b64_json).tolist() for each in answer.data] == alone.tolist()
    assert (answer.seeds, answer.size, answer.model) == ([7, 8], "64x64", "tiny")
    text = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json))).text
    assert (text["prompt"], text["seeds"], text["model"]) == ("a red apple", "8", "tiny")
    assert client.models.retrieve("tiny").id == "tiny"
    assert "dev" in [model.id for model in client.models.list()]


def test_partial_pictures(client, alone):
    stream = client.images.generate(
        prompt="a red apple", size="64x64", stream=True, partial_images=2, extra_body=FAST
    )
    events = list(stream)
    assert [event.type.split(".")[1] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    made = [picture(event.b64_json).astype(int) for event in events]
    assert made[-1].tolist() == alone[0].tolist()
    first, second = (np.abs(each - made[-1]).mean() for each in made[:2])
    assert 0 < second < first < 128  # each is nearer to the picture


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_formats(client, format):
    answer = client.images.generate(
        quality="high",
        user="me",
        moderation="low",  # taken without effect
        prompt="a red apple",
        size="48x64",
        output_format=format,
        output_compression=50,
        extra_body=FAST,
    )
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert (image.format, image.size) == (format.upper(), (48, 64))


def test_adapters(server, client, alone):
    write_dataset(server, "taught", 1)
    run = server.ok("/train", output_name="taught", iterations=2, learning_rate=0.1, **TINY)["run_id"]
    server.wait(run, "done")

    def made(strength: float) -> list:
        adapters = [{"name": "taught", "strength": strength}]
        answer = client.images.generate(
            prompt="a red apple", size="64x64", extra_body=FAST | {"adapters": adapters}
        )
        return picture(answer.data[0].b64_json).tolist()

    assert made(0.0) == alone[0].tolist()
    assert made(1.0) != alone[0].tolist()
    with pytest.raises(openai.NotFoundError, match="there is no adapter 'absent'"):
        client.images.generate(prompt="x", extra_body={"adapters": [{"name": "absent"}]})


def form(content: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(content).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def before() -> np.ndarray:
    """A picture (H, W, 3) with something to see."""
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def test_a_picture_is_changed_where_the_mask_is_transparent(client, before):
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[16:48, 16:48, 3] = 0
    asked = {"image": ("a.png", form(before)), "mask": ("m.png", form(mask)), "prompt": "a red apple"}
    stream = client.images.edit(**asked, stream=True, partial_images=1, extra_body={"steps": 4, "seed": 7})
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    made = picture(events[-1].b64_json)
    is_free = mask[..., 3] == 0
    assert (made[~is_free] == before[~is_free]).all()  # to the bit
    assert (made[is_free] != before[is_free]).mean() > 0.5
    text = Image.open(io.BytesIO(base64.b64decode(events[-1].b64_json))).text
    assert (text["image"], text["mask"], text["strength"]) == ("a.png", "m.png", "1.0")


def test_a_picture_is_changed_by_its_own_transparency(client, before):
    image = np.dstack([before, np.full((64, 64), 255, np.uint8)])
    image[:32, :, 3] = 0
    answer = client.images.edit(image=form(image), prompt="a red apple", extra_body={"steps": 2, "seed": 1})
    made = picture(answer.data[0].b64_json)
    assert (made[32:] == before[32:]).all()
    assert (made[:32] != before[:32]).mean() > 0.5


def test_the_whole_picture_is_changed_by_strength(client, before):
    def made(strength: float) -> np.ndarray:
        asked = {"image": form(before), "prompt": "a red apple"}
        body = {"steps": 8, "seed": 1, "strength": strength, "adapters": "[]"}
        return picture(client.images.edit(**asked, extra_body=body).data[0].b64_json).astype(int)

    little, much = (np.abs(made(strength) - before).mean() for strength in (0.25, 1.0))
    assert little < much


@pytest.mark.parametrize(
    ("files", "fields", "words"),
    [
        ({}, {"prompt": "x"}, "form"),
        ({"mask": b""}, {"prompt": "x"}, "mask is not a picture"),
        ({"image": b"no picture"}, {"prompt": "x"}, "image is not a picture"),
        ({"image": png()}, {}, "prompt: Field required"),
        ({"image": png()}, {"prompt": "x", "strength": "2"}, "strength: "),
        ({"image": png(), "mask": png((64, 32))}, {"prompt": "x"}, "one aspect ratio"),
        ({"image": png()}, {"prompt": "x", "adapters": "{"}, "adapters: not JSON"),
    ],
)
def test_edits_that_are_refused(server, files, fields, words):
    answer = server.http.post("/v1/images/edits", files=files, data=fields)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]


def test_kontext_is_told_what_to_change(tmp_path, monkeypatch):
    """It reads the pictures, all of them, beside the prompt."""
    monkeypatch.setattr(variants, "KONTEXT_SIZES", ((32, 32),))
    model = str(tiny_pipeline.write_checkpoint(tmp_path, row="kontext"))
    said = []
    generator = Generator(lambda id, event, **values: said.append((event, values)), lambda id: False)
    files = [["a.png", base64.b64encode(png()).decode()], ["b.png", base64.b64encode(png(seed=5)).decode()]]
    job = {"id": 1, "prompt": "make it red", "seeds": [1], "model": "kontext", "model_file": model}
    for given in (files[:1], files):
        generator.make(Job(**job, adapters=[], adapter_files=[], steps=1, size=[32, 32], images=given))
    first, second = (values["picture"] for event, values in said if event == "picture")
    assert (picture(first) != picture(second)).any()
    text = Image.open(io.BytesIO(base64.b64decode(second))).text
    assert text["reference"] == "a.png\nb.png"
    assert "image" not in text


def test_one_picture_is_changed(client):
    with pytest.raises(openai.UnprocessableEntityError, match="the model tiny changes one"):
        client.images.edit(image=[png(), png()], prompt="x")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "x", "size": "64"}, 422, "size"),
        ({"prompt": "x", "size": "99999x99999"}, 422, "GB"),
        ({"prompt": "x", "n": 11}, 422, "n: "),
        ({"prompt": "x", "model": "absent"}, 404, "no model 'absent'"),
        ({"prompt": "x", "model": "../secret"}, 422, "model: "),
        ({"prompt": "x", "background": "transparent"}, 422, "background"),
        ({"prompt": "x", "sead": 1}, 422, "sead: "),
        ({"prompt": "x", "negative_prompt": "y", "cfg_scale": 1}, 422, "cfg scale"),
        ({"prompt": "x", "response_format": "url"}, 422, "response_format"),
    ],
)
def test_refusals(server, body, status, words):
    answer = server.post("/v1/images/generations", **body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    streamed = server.post("/v1/images/generations", **body, stream=True)
    assert streamed.status_code == status, streamed.text


def generators(server) -> list[int]:
    return processes_of(server.root, "generator")


def test_a_model_stays_and_leaves(server):
    server.ok("/v1/images/generations", prompt="x", steps=1)
    before = generators(server)
    server.ok("/v1/images/generations", prompt="y", steps=1)
    assert generators(server) == before
    assert len(before) == 1
    server.ok("/v1/images/generations", prompt="x", steps=1, keep_alive=0)
    end = time.monotonic() + 5
    while generators(server):
        assert time.monotonic() < end


def test_who_goes_away_stops_the_picture(server):
    body = {"prompt": "x", "steps": 500, "size": "192x192", "stream": True}
    with server.http.stream("POST", "/v1/images/generations", json=body):
        pass  # it has begun
    start = time.monotonic()
    server.ok("/v1/images/generations", prompt="x", steps=1)
    assert time.monotonic() - start < 10


def test_a_generator_that_is_killed(server):
    body = {"prompt": "x", "steps": 500, "size": "192x192", "stream": True}
    with server.http.stream("POST", "/v1/images/generations", json=body) as stream:
        for pid in generators(server):
            os.kill(pid, signal.SIGKILL)
        lines = list(stream.iter_lines())
    assert lines[0] == "event: error"
    assert "the generator was ended" in lines[1]
    server.ok("/v1/images/generations", prompt="x", steps=1)


def test_a_model_that_does_not_fit_is_refused():
    said = []
    generator = Generator(lambda id, event, **values: said.append(event), lambda id: False)
    job = {"id": 1, "prompt": "x", "seeds": [1], "model": "tiny", "model_file": "tiny"}
    with pytest.raises(MemoryError, match=r"the model tiny needs 0\.0\d GB, and a training leaves 0\.00 GB"):
        generator.make(Job(**job, adapters=[], adapter_files=[], room=1000))
    assert not said
