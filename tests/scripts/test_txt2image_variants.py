"""txt2image.py with models that are given pictures: options, the recipe and --remake, what is missing."""

import re

import numpy as np
import pytest

from flux import images
from flux.conditioning import variants

from .. import tiny_pipeline
from ..model_adapters import FLOW, HIDDEN, write

PROMPT = ("a red apple", "--seed", 1, "--steps", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """The folder of a model of each kind."""
    return {
        row: str(tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("models") / row, row=row))
        for row in ("dev", "fill", "canny", "kontext")
    }


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    """Two pictures, and a mask of the first."""
    monkeypatch.setattr(variants, "KONTEXT_SIZES", ((48, 64), (64, 48)))
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 56)), ("b.png", (56, 40))):
        images.save(tmp_path / name, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    mask = np.zeros((40, 56, 3), np.uint8)
    mask[8:24, 8:32] = 255
    images.save(tmp_path / "mask.png", mask)


CASES = [
    ("fill", ["--image", "a.png", "--mask", "mask.png"], (40, 56), {"image": "a.png", "mask": "mask.png"}),
    ("canny", ["--control", "a.png"], (48, 64), {"control": "a.png"}),
    ("kontext", ["--reference", "b.png", "--reference", "a.png"], (64, 48), {"reference": "b.png\na.png"}),
]


@pytest.mark.parametrize(("row", "options", "size", "recipe"), CASES)
def test_a_picture_and_the_same_again(call, models, tmp_path, row, options, size, recipe):
    status, _, err = call(*PROMPT, "--model", models[row], *options)
    assert (status, err) == (0, [])
    made, _ = images.load(tmp_path / "out.png")
    assert made.shape == (*size, 3)
    text = images.read_metadata(tmp_path / "out.png")
    assert {name: text[name] for name in recipe} == recipe
    names = [line.split(" ", 1)[1] for line in text["pictures"].splitlines()]
    assert sorted(names) == sorted("\n".join(recipe.values()).split("\n"))
    assert call("--remake", "out.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    images.save(tmp_path / "a.png", np.zeros((40, 56, 3), np.uint8))
    status, _, err = call("--remake", "out.png")
    assert status == 2
    assert re.search("a.png is another picture than the one that out.png was made from", err[-1])


def test_a_control_lora(call, models, tmp_path):
    write(tmp_path / "flux1-canny-dev-lora.safetensors", FLOW | {"img_in": (HIDDEN, 128)})
    lora = ("--adapter", "flux1-canny-dev-lora.safetensors:0.8", "--control", "a.png")
    for more in ([], ["--fuse-adapter"], ["--quantize"]):
        status, _, err = call(*PROMPT, "--model", models["dev"], *lora, *more)
        assert status == 0, err
        text = images.read_metadata(tmp_path / "out.png")
        assert (text["control"], text["guidance"]) == ("a.png", "30.0")


BAD = [
    ("fill", [], "fill fills a part of a picture: --image PICTURE, and --mask"),
    ("fill", ["--image", "a.png"], "fill fills a part of a picture"),
    ("canny", [], "canny follows a control picture"),
    ("canny", ["--control", "gone.png"], "cannot read the picture gone.png: No such file"),
    ("canny", ["--control", "a.png", "--control", "b.png"], "--control is given once for a model, or once"),
    ("canny", ["--control-edges"], "--control-edges is of a control picture; name it with --control"),
    ("canny", ["--control", "a.png", "--control-mode", "canny"], "--control-mode is of a ControlNet"),
    (
        "dev",
        ["--reference", "a.png"],
        r"dev takes no reference: --reference needs Kontext \(--model",
    ),
    ("kontext", ["--reference", "gone.png"], "cannot read the picture gone.png: No such file"),
    ("dev", ["--control", "a.png"], "dev takes no control picture: --control needs --model canny or depth"),
]


@pytest.mark.parametrize(("row", "options", "line"), BAD)
def test_bad_input_is_one_line(call, models, tmp_path, row, options, line):
    status, out, err = call(*PROMPT, "--model", models[row], *options)
    assert (status, out, len(err)) == (2, [], 1)
    assert re.search(line, err[0])
    assert not (tmp_path / "out.png").exists()


def test_edges_without_opencv_say_what_to_install(call, models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    status, _, err = call(*PROMPT, "--model", models["canny"], "--control", "a.png", "--control-edges")
    assert status == 2
    assert "pip install -r requirements-control.txt" in err[-1]
