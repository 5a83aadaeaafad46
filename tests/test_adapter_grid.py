"""The grid of checkpoints, strengths and prompts: which picture stands where, and what it must equal."""

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux import images
from flux.adapters import save
from flux.adapters.__main__ import main
from flux.adapters.beside import AdaptedLinear
from flux.errors import FluxError
from flux.evaluation.grid import BASE, Named, draw, encode, grid, read
from flux.pipeline import FluxPipeline
from flux.requests import Request

from . import tiny_pipeline
from .model_adapters import CLIP, FLOW, MODULATION, make, write

PROMPTS = ["a photo of sks dog", "a photo of a dog"]
SAMPLING = Request("", seeds=(3, 8), image_size=(32, 48), steps=2)
FLOW_ONLY, BOTH = Named("first", make(FLOW, 1)), Named("second", make({**FLOW, **MODULATION, **CLIP}, 2))
PARTS = [["flux"], ["flux", "clip"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def alone(model: str, folder: Path, prompt: str, seed: int, named: Named | None, strength: float):
    """The picture that the pipeline makes with one adapter, or without one, loaded for nothing else."""
    files = []
    if named is not None:
        save(folder / "one.safetensors", named.adapter, "native")
        files = [(folder / "one.safetensors", strength)]
    pipeline = FluxPipeline(model, adapters=files)
    return pipeline.generate_images(prompt, 1, seed, SAMPLING.image_size, SAMPLING.steps)[0]


def test_every_picture_is_the_one_that_its_adapter_makes_alone(model, tmp_path):
    """To the bit; the other adapters and strengths before it leave nothing behind."""
    adapters, strengths = [FLOW_ONLY, BOTH], [1.0, 0.0, -0.5]
    pictures = draw(FluxPipeline(model), adapters, PARTS, PROMPTS, strengths, SAMPLING)
    assert pictures.keys() == {BASE, (0, 1.0), (0, -0.5), (1, 1.0), (1, -0.5)}
    places = [(prompt, seed) for prompt in PROMPTS for seed in SAMPLING.seeds]
    for (number, strength), own in pictures.items():
        assert len(own) == len(places)
        named = None if number is None else adapters[number]
        for place in (0, 3):
            expected = alone(model, tmp_path, *places[place], named, strength)
            assert np.array_equal(own[place], expected), (number, strength, place)
    assert len({picture.tobytes() for own in pictures.values() for picture in own}) == 5 * 4


def test_strength_0_of_an_adapter_that_is_on_is_the_model_alone(model, tmp_path):
    for prompt in PROMPTS:
        base = alone(model, tmp_path, prompt, 3, None, 0.0)
        assert np.array_equal(alone(model, tmp_path, prompt, 3, BOTH, 0.0), base)
        assert not np.array_equal(alone(model, tmp_path, prompt, 3, BOTH, 0.1), base)


def test_texts_are_encoded_once_unless_an_adapter_changes_the_encoders(model, monkeypatch):
    pipeline, encoded = FluxPipeline(model), []
    original = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda *args: encoded.append(args[0]) or original(*args))
    requests = [replace(SAMPLING, prompt=prompt).resolved(pipeline) for prompt in PROMPTS]
    texts = encode(pipeline, [FLOW_ONLY, BOTH], PARTS, requests, [0.0, 0.5, 1.0])
    assert encoded == PROMPTS * 3  # the model alone, and two strengths of the adapter with CLIP
    assert texts[0, 0.5] is texts[0, 1.0] is texts[BASE]
    half, full = (texts[1, strength].texts[requests[0].texts].positive.clip for strength in (0.5, 1.0))
    assert not mx.array_equal(half, full)
    assert not any(isinstance(module, AdaptedLinear) for module in pipeline.clip.modules())


def test_the_sheet_has_a_row_for_each_checkpoint_and_the_base_in_each(model):
    picture = grid(FluxPipeline(model), [FLOW_ONLY, BOTH], PROMPTS[:1], PROMPTS[1], [0.0, 1.0], SAMPLING)
    base = draw(FluxPipeline(model), [FLOW_ONLY], PARTS[:1], PROMPTS, [0.0], SAMPLING)[BASE]
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (32, 48))
    for tile in base:  # both checkpoints' rows show it, in one column
        found = np.argwhere((windows == tile[..., 0]).all((2, 3)))
        assert len(found) == 2
        assert found[0, 1] == found[1, 1]


def test_the_table_of_likeness(model, monkeypatch):
    """Of the prompts' pictures and, apart from them, of the class prompt's: means over all seeds."""
    rows = []
    monkeypatch.setattr("flux.sheets.table", lambda found: rows.extend(found))
    adapters, strengths = [FLOW_ONLY, BOTH], [0.0, 1.0]

    def bright(pictures):
        return np.mean([picture.mean() for picture in pictures])

    grid(FluxPipeline(model), adapters, PROMPTS[:1], PROMPTS[1], strengths, SAMPLING, bright)
    drawn = draw(FluxPipeline(model), adapters, PARTS, PROMPTS, strengths, SAMPLING)
    for i, adapter in enumerate(adapters):
        for part, which in (("the prompts", slice(0, 2)), ("the class prompt", slice(2, 4))):
            values = [bright(drawn[cell][which]) for cell in (BASE, (i, 1.0))]
            assert [f"{adapter.name}\n{part}", *(f"{value:.3f}" for value in values)] in rows


def test_the_checkpoints_of_a_folder_are_in_order(tmp_path):
    names = ["flux1.safetensors", "flux1-000100.safetensors", "flux1-000025.safetensors"]
    for name in names:
        write(tmp_path / name, FLOW)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(1)})
    with pytest.warns(UserWarning, match=r"left out: .*other\.safetensors"):
        assert [each.name for each in read([tmp_path])] == ["flux1-000025", "flux1-000100", "flux1"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FluxError, match="none: no adapter in this folder"):
        read([tmp_path / "none"])


def test_the_program(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("a.safetensors", make(FLOW), "native", {"trigger": "sks dog"})
    command = ["grid", "--model", model, "--steps", "1", "--image-size", "32", "--strengths", "0", "1"]
    prompts = ["--prompt", "a photo of sks dog", "sks dog on a beach", "--class-prompt"]
    assert main([*command, "--adapter", "a.safetensors", *prompts, "a dog", "--output", "g.png"]) == 0
    assert capsys.readouterr().out == "g.png\n"
    text = images.read_metadata("g.png")
    assert (text["prompts"], text["class_prompt"]) == ("a photo of sks dog\nsks dog on a beach", "a dog")
    assert Image.open("g.png").height > 3 * 32
    assert main([*command, "--adapter", "a.safetensors", *prompts, "the SKS dog"]) == 0
    assert "names the trigger 'sks dog'" in capsys.readouterr().err


BAD = [
    (["--adapter", "none.safetensors", "--prompt", "a"], r"none\.safetensors: cannot be read"),
    (["--adapter", "b.safetensors", "--prompt", "a"], "b: nothing of this adapter fits"),
    (["--adapter", "a.safetensors"], "no prompt"),
    (["--adapter", "a.safetensors", "--prompt", " "], "prompt is empty"),
    (["--adapter", "a.safetensors", "--prompt", "a", "--output", "g.jpg"], r"g\.jpg: .*\.png"),
    (["--adapter", "a.safetensors", "--prompt", "a", "--output", "no/g.png"], "folder no does not exist"),
    (["--adapter", "a.safetensors", "--prompt", "a", "--steps", "0"], "steps must be at least 1, not 0"),
    (["--adapter", "a.safetensors", "--prompt", "a", "--compare", "none"], "none: no pictures to compare"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_has_one_clear_line_and_writes_nothing(model, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors", FLOW)
    write(tmp_path / "b.safetensors", {"single_blocks.0.linear1": (14, 7)})
    assert main(["grid", "--model", model, *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch("error: .*\n", err)
    assert re.search(message, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
