"""What a picture remembers of how it was made: files, their text, what is made again and what is kept."""

import os
from dataclasses import replace

import numpy as np
import pytest

from flux import images, metadata
from flux.errors import FluxError
from flux.metadata import Recipe

OPTIONS = {"model": "tiny", "t5": None, "steps": 3, "guidance": 2.5, "cfg_scale": 1.0, "fuse_adapter": True}
OPTIONS |= {"no_t5_padding": False, "decoding_batch_size": 1}
RECIPE = Recipe(
    prompts=("a cat", "un café ☃"),
    seed=7,
    n_images=2,
    n_rows=2,
    options=OPTIONS,
    adapter=(("my:lora.safetensors", 0.5), ("b.safetensors", 1.0)),
    image_size=(16, 32),
)
PICTURES = [np.full((16, 32, 3), 50 * i, np.uint8) for i in range(4)]


def test_a_grid_and_its_text(tmp_path):
    assert RECIPE.save(tmp_path / "out.png", False, PICTURES) == [tmp_path / "out.png"]
    picture, _ = images.load(tmp_path / "out.png")
    assert picture.shape == (32, 64, 3)
    assert picture[::16, ::32, 0].tolist() == [[0, 50], [100, 150]]
    assert images.read_metadata(tmp_path / "out.png") == {
        "prompt": "a cat\nun café ☃",
        "model": "tiny",
        "adapter": "my:lora.safetensors:0.5\nb.safetensors:1.0",
        "fuse_adapter": "True",
        "cfg_scale": "1.0",
        "guidance": "2.5",
        "steps": "3",
        "image_size": "16x32",
        "seed": "7",
        "n_images": "2",
        "n_rows": "2",
        "decoding_batch_size": "1",
        "seeds": "7 8 7 8",
        "version": f"flux-mlx {metadata.__version__}",
    }


def test_single_files_name_their_prompt_and_their_picture(tmp_path):
    paths = RECIPE.save(tmp_path / "out.png", True, PICTURES)
    assert [path.name for path in paths] == ["out.0.png", "out.1.png", "out.2.png", "out.3.png"]
    options, prompts = metadata.read(paths[3])
    assert prompts == ["un café ☃"]
    assert options["picture"] == 1
    assert (options["seed"], options["n_images"], options["n_rows"]) == ("7", "2", "2")
    assert (options["fuse_adapter"], options["no_t5_padding"]) == (True, False)
    assert images.read_metadata(paths[3])["seeds"] == "8"


def test_the_one_picture_that_is_kept(tmp_path):
    """As --remake makes it: the same file as the one of the batch."""
    paths = RECIPE.save(tmp_path / "out.png", True, PICTURES)
    one = replace(RECIPE, prompts=("un café ☃",), picture=1)
    again = one.save(tmp_path / "again.png", False, PICTURES[2:])
    assert again[0].read_bytes() == paths[3].read_bytes()
    assert one.save(tmp_path / "raw.png", True, PICTURES[2:])[0].name == "raw.0.png"


def test_only_pictures_of_this_program_are_read(tmp_path):
    images.save(tmp_path / "plain.png", PICTURES[0], {"prompt": "a cat"})
    with pytest.raises(FluxError, match=r"plain\.png does not say how it was made"):
        metadata.read(tmp_path / "plain.png")


def test_what_must_be_made(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "w.safetensors").write_bytes(b"")
    recipes = [
        replace(RECIPE, prompts=(name,), options={**OPTIONS, "model": str(model)}) for name in ("a", "b", "c")
    ]
    outputs = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert metadata.unmade(recipes, outputs, False) == [0, 1, 2]
    for recipe, output in zip(recipes, outputs, strict=True):
        recipe.save(output, False, PICTURES[:2])
        os.utime(output, (2**31, 2**31))
    assert metadata.unmade(recipes, outputs, False) == []
    assert metadata.unmade(recipes, outputs, True) == [0, 1, 2]
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"damaged")
    assert metadata.unmade(recipes, outputs, False) == [0, 1]
    assert metadata.unmade([replace(recipes[2], seed=8)], outputs[2:], False) == [0]
    os.utime(model / "w.safetensors", (2**32, 2**32))  # as a model that was trained on
    assert metadata.unmade(recipes[2:], outputs[2:], False) == [0]


def test_the_sources():
    recipe = replace(RECIPE, options={**OPTIONS, "ae": "x/ae.safetensors"})
    assert recipe.sources() == ["tiny", "x/ae.safetensors", "my:lora.safetensors", "b.safetensors"]
