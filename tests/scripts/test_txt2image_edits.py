"""txt2image.py with a picture that is changed."""

import re

import numpy as np
import pytest
from PIL import Image

from flux import images

from ..model_adapters import CLIP, FLOW, MODULATION, write

PROMPT = "a red apple on a blue background"


@pytest.fixture
def photo(tmp_path):
    """photo.png of 40x56; its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return pixels


@pytest.fixture
def white(tmp_path):
    """mask.png of half that size; where it is white, at the photo's size."""
    mask = np.zeros((20, 28), np.uint8)
    mask[4:12, 4:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return np.kron(mask, np.ones((2, 2))) > 0


def run(call, model, *args) -> list[str]:
    """Makes out.png of photo.png; what the program said of it."""
    status, _, err = call(PROMPT, "--model", model, "--seed", 0, "--image", "photo.png", *args)
    assert status == 0, err
    return err


def remade(call, tmp_path) -> bool:
    """Whether --remake gives out.png again, to the byte."""
    assert call("--remake", "out.png", "--output", "again.png")[0] == 0
    return (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_inpainting_keeps_the_rest_and_can_be_made_again(call, model, tmp_path, photo, white):
    assert run(call, model, "--mask", "mask.png", "--grow", 2, "--feather", 3, "--n-images", 2) == []
    picture, _ = images.load(tmp_path / "out.png")
    assert picture.shape == (40, 112, 3)
    reach = np.zeros((40, 56), bool)
    reach[3:29, 3:37] = True
    for made in np.split(picture, 2, axis=1):
        assert np.array_equal(made[~reach], photo[~reach])
        assert (made[white] != photo[white]).mean() > 0.9
    recipe = images.read_metadata(tmp_path / "out.png")
    assert recipe["seed"] == "0"
    assert [recipe[name] for name in ("image", "mask", "grow", "feather")] == [
        "photo.png",
        "mask.png",
        "2",
        "3",
    ]
    assert [line[64:] for line in recipe["pictures"].splitlines()] == [" photo.png", " mask.png"]
    assert remade(call, tmp_path)


def test_remake_says_which_picture_is_gone_or_changed(call, model, tmp_path, photo, white):
    run(call, model, "--mask", "mask.png")
    (tmp_path / "mask.png").rename(tmp_path / "other.png")
    assert call("--remake", "out.png")[::2] == (
        2,
        ["error: cannot read the picture mask.png: No such file or directory"],
    )
    Image.fromarray(255 - photo).save(tmp_path / "mask.png")
    status, _, err = call("--remake", "out.png")
    assert status == 2
    assert err == ["error: mask.png is another picture than the one that out.png was made from"]


@pytest.mark.parametrize(
    ("args", "size"),
    [
        (["--expand", "8,24,0,1"], (48, 81)),
        (["--expand", "16", "--image-size", "64x48"], (96, 80)),
        (["--strength", "0"], (40, 56)),
        (["--image-size", "50x60", "--fit", "pad", "--strength", "0.5"], (50, 60)),
        (["--mask", "mask.png", "--crop-mask=4", "--image-size", "32"], (40, 56)),
        (["--mask", "mask.png", "--crop-mask", "--no-keep", "--image-size", "32"], (40, 56)),
    ],
)
def test_sizes_and_recipes(call, model, tmp_path, photo, white, args, size):
    run(call, model, *args)
    assert images.load(tmp_path / "out.png")[0].shape == (*size, 3)
    assert remade(call, tmp_path)


def test_an_expanded_picture_holds_the_given_one(call, model, tmp_path, photo):
    run(call, model, "--expand", "8,24,0,16")
    assert np.array_equal(images.load(tmp_path / "out.png")[0][8:, 16:72], photo)


def test_a_photograph_that_lies_on_its_side(call, model, tmp_path, photo):
    """EXIF says that it is to be turned: what is shown upright is changed, and masked."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is up
    Image.fromarray(np.rot90(photo)).save(tmp_path / "photo.png", exif=exif)
    Image.fromarray(np.full((40, 8), 255, np.uint8)).resize((56, 40)).save(tmp_path / "mask.png")
    run(call, model, "--mask", "mask.png", "--strength", "0")
    assert images.load(tmp_path / "out.png")[0].shape == (40, 56, 3)


BAD_ARGUMENTS = [
    (["--strength", "0.5"], "--strength needs the picture that is changed: --image"),
    (["--mask", "mask.png"], "--mask needs"),
    (["--fit", "pad"], "--fit needs"),
    (["--crop-mask=0"], "--crop-mask needs"),
    (["--image", "none.png"], r"cannot read the picture none\.png: No such file"),
    (["--image", "text.png"], r"text\.png is not a picture"),
    (["--image", "photo.png", "--mask", "none.png"], r"none\.png: No such file"),
    (["--image", "photo.png", "--strength", "1.5"], "strength must lie between 0 .*, not 1.5"),
    (["--image", "photo.png", "--mask", "wide.png"], r"wide\.png is 20x56 .* its picture 40x56"),
    (["--image", "photo.png", "--mask", "black.png"], r"black\.png is black all over"),
    (["--image", "photo.png", "--mask", "alpha"], r"photo\.png has no transparent part"),
    (["--image", "photo.png", "--feather", "4"], "feather has no effect without a mask"),
    (["--image", "photo.png", "--mask", "mask.png", "--feather", "-4"], "feather must be 0 or more"),
    (
        ["--image", "photo.png", "--mask", "mask.png", "--crop-mask", "wide"],
        "crop-mask: .*auto, not wide",
    ),
    (["--image", "photo.png", "--expand", "1,2,3"], "expand: must be TOP,RIGHT,BOTTOM,LEFT .*not 1,2,3"),
    (["--image", "photo.png", "--expand=-1,0,0,0"], "expand: .*not -1,0,0,0"),
    (["--image", "photo.png", "--expand", "0"], "0 or more pixels at each side, at one by more"),
    (["--image", "photo.png", "--fit", "squash"], "fit: .*squash"),
    (["--image", "photo.png", "--expand", "9999,0,0,0"], r"photo\.png is .*10039x56 .* --image-size"),
]


@pytest.mark.parametrize(("args", "message"), BAD_ARGUMENTS)
def test_bad_input_has_one_clear_line(call, model, tmp_path, photo, white, args, message):
    Image.fromarray(np.full((20, 56), 255, np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("hello")
    status, out, err = call(PROMPT, "--model", model, "--seed", 1, *args)
    assert (status, out, len(err)) == (2, [], 1)
    assert re.search(message, err[0])
    assert not (tmp_path / "out.png").exists()


def test_with_adapters_few_bits_negative_prompts_and_unipc(call, model, tmp_path, photo, white):
    """Each of three pictures is the same alone, outside the mask the photo, and remade to the byte."""
    write(tmp_path / "a.safetensors", {**FLOW, **MODULATION, **CLIP}, seed=1)
    more = ("--mask", "mask.png", "--adapter", "a.safetensors", "--quantize", 8, "--solver", "unipc")
    more += ("--negative-prompt", "a pear", "--cfg-scale", 3, "--cfg-end", 0.5, "--nag", 3, "--save-raw")
    status, _, err = call(
        PROMPT, "--model", model, "--seed", 4, "--image", "photo.png", *more, "--n-images", 3
    )
    assert (status, len(err)) == (0, 1), err
    made = [images.load(tmp_path / f"out.{i}.png")[0] for i in range(3)]
    for picture in made:
        assert np.array_equal(picture[~white], photo[~white])
    alone = ("--seed", 5, "--output", "alone.png")
    assert call(PROMPT, "--model", model, "--image", "photo.png", *more[:-1], *alone)[0] == 0
    assert np.array_equal(images.load(tmp_path / "alone.png")[0], made[1])
    assert call("--remake", "out.1.png", "--output", "again.png")[0] == 0
    assert np.array_equal(images.load(tmp_path / "again.png")[0], made[1])
    fused = ("--fuse-adapter", "--seed", 5, "--output", "fused.png")
    assert call(PROMPT, "--model", model, "--image", "photo.png", *more[:-1], *fused)[0] == 0
    near = images.load(tmp_path / "fused.png")[0].astype(float) - made[1]
    assert 0 < np.abs(near[white]).mean() < np.abs(made[0].astype(float) - made[1])[white].mean()
