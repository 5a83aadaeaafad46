"""txt2image.py with --redux: variations, their recipes, and every bad input."""

import re

import numpy as np
import pytest
from PIL import Image

from flux import images

from .. import redux_files

R = ("--redux-model", "r")
SIGLIP = ("--redux-model", "r/image_encoder/model.safetensors")


@pytest.fixture
def pictures(tmp_path):
    """cat.png and dog.png in the test's folder, the latter partly transparent, and Redux in r/."""
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (30, 44, 3), np.uint8)).save(tmp_path / "cat.png")
    Image.fromarray(rng.integers(0, 256, (60, 21, 4), np.uint8)).save(tmp_path / "dog.png")
    redux_files.write_diffusers(tmp_path / "r")
    return tmp_path


@pytest.fixture
def draw(call, model, pictures):
    def draw(*args):
        return call("--model", model, "--seed", 3, *args)

    return draw


def test_a_variation_and_its_recipe(draw, call, pictures):
    """Without a prompt, with a strength, several; remade to the byte, and with another picture."""
    given = ("--redux-model", "r", "--redux", "cat.png", "--redux", "dog.png:0.5")
    assert draw(*given, "--output", "two.png") == (0, ["two.png"], [])
    recipe = images.read_metadata(pictures / "two.png")
    assert recipe["redux"] == "cat.png:1.0\ndog.png:0.5"
    assert (recipe["prompt"], recipe["redux_model"]) == ("", "r")
    assert [line.split()[1] for line in recipe["pictures"].splitlines()] == ["cat.png", "dog.png"]
    assert not recipe.keys() & {"redux_blend", "siglip"}
    assert call("--remake", "two.png", "--output", "again.png")[0] == 0
    assert (pictures / "again.png").read_bytes() == (pictures / "two.png").read_bytes()
    assert call("--remake", "two.png", "--redux", "dog.png", "--output", "dog.jpg")[0] == 0
    assert images.read_metadata(pictures / "dog.jpg")["redux"] == "dog.png:1.0"
    assert call("--remake", "two.png", "--redux-blend", "--output", "mixed.png")[0] == 0
    assert images.read_metadata(pictures / "mixed.png")["redux_blend"] == "True"
    made = [images.load(pictures / name)[0].tobytes() for name in ("two.png", "dog.jpg", "mixed.png")]
    assert len(set(made)) == 3


def test_with_prompts(draw, pictures):
    """Several, with true guidance, adapters' place beside them, and few bits."""
    options = ("--cfg-scale", 2, "--negative-prompt", "two birds", "--quantize", 8, "--n-images", 2)
    status, out, err = draw("a", "b", "--redux", "cat.png", "--redux-model", "r", *options)
    assert (status, out) == (0, ["out.png"])
    assert [line.split(":")[0] for line in err if "step" not in line] == ["quantized"]
    assert images.load(pictures / "out.png")[0].shape == (128, 96, 3)


def test_a_remake_says_what_has_changed(draw, call, pictures):
    draw("--redux", "cat.png", "--redux-model", "r", "--output", "a.png")
    Image.new("RGB", (9, 9)).save(pictures / "cat.png")
    status, _, err = call("--remake", "a.png")
    assert (status, err) == (2, ["error: cat.png is another picture than the one that a.png was made from"])
    (pictures / "cat.png").unlink()
    status, _, err = call("--remake", "a.png")
    assert (status, err) == (2, ["error: cannot read the picture cat.png: No such file or directory"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--redux", "cat.png:1.5", *R],
            r"the strength of cat\.png for Redux must be .* 1\.5",
        ),
        (["--redux", "cat.png:0", *R], r"above 0 and at most 1, not 0\.0"),
        (
            ["--redux", "cat.png:much", *R],
            r"strength of cat\.png must be a number, not 'much'",
        ),
        (["--redux", "bird.png", *R], r"cannot read the picture bird\.png: No such file"),
        (["--redux", "r/image_encoder/config.json", *R], r"is not a picture that Pillow"),
        (
            ["--redux", "cat.png", "--redux-model", "r/image_encoder/model.safetensors"],
            r"holds no FLUX\.1 Redux",
        ),
        (["--redux", "cat.png", "--redux-model", "nowhere"], r"nowhere: no such file or folder"),
        (["a", *R], r"are of pictures; name one with --redux"),
        (["a", "--redux-blend"], r"are of pictures; name one with --redux"),
        ([*R], r"no prompt"),
    ],
)
def test_bad_input(arguments, words, draw, pictures):
    status, out, err = draw(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert re.search(words, err[0]), err[0]
    assert not (pictures / "out.png").exists()


def test_the_hubs_redux_is_the_default(draw, environment, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = draw("--redux", "cat.png")
    assert status == 2
    assert "black-forest-labs/FLUX.1-Redux-dev" in err[0]
