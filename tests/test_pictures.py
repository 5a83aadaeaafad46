"""A sample's picture: every kind of file, upright, masked or over white, cut and coloured by its seed."""

import numpy as np
import pytest
from PIL import Image

from flux import images
from flux.data import pictures, samples
from flux.errors import FluxError
from tests.datasets import OPTIONS, random_picture, write_pictures


def placed(path, **options):
    dataset = samples.load(path, {**OPTIONS, "class_tokens": "x", **options})
    return pictures.fit(dataset)


def test_pictures_of_all_kinds(tmp_path):
    picture = random_picture(64, 64)
    Image.fromarray(picture).save(tmp_path / "a_rgb.png")
    grey = Image.fromarray(picture[..., 0])
    grey.save(tmp_path / "b_grey.png")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(tmp_path / "c_grey16.png")
    frames = [Image.fromarray(np.full((64, 64), value, np.uint8)) for value in (50, 200)]
    frames[0].save(tmp_path / "d_animated.gif", save_all=True, append_images=frames[1:])
    rgb, grey8, grey16, animated = (pictures.prepare(p, 0, 0)[0] for p in placed(tmp_path))
    assert np.array_equal(rgb, picture)
    assert np.array_equal(grey8, np.repeat(picture[..., :1], 3, axis=2))
    assert np.array_equal(grey16, grey8)
    assert np.all(animated == 50)


def test_turned_pictures_are_placed_as_they_are_seen(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # turn by a quarter to the right
    Image.fromarray(random_picture(64, 128)).save(tmp_path / "a.png", exif=exif)
    (turned,) = placed(tmp_path)
    assert turned.size == (128, 64)
    stored = random_picture(64, 128)
    whole = placed(tmp_path, resolution=(128, 64))[0]
    assert np.array_equal(pictures.prepare(whole, 0, 0)[0], np.rot90(stored, -1))


def test_alpha_is_a_mask_or_lies_over_white(tmp_path):
    rgba = random_picture(64, 64, channels=4)
    rgba[:8, :, 3], rgba[8:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    over_white, no_mask = pictures.prepare(placed(tmp_path)[0], 0, 0)
    assert no_mask is None
    assert np.all(over_white[:8] == 255)
    assert np.array_equal(over_white[8:], rgba[8:, :, :3])
    picture, mask = pictures.prepare(placed(tmp_path, alpha_mask=True)[0], 0, 0)
    assert np.array_equal(picture, rgba[..., :3])
    assert np.array_equal(mask, rgba[..., 3])
    half = images.over_white(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 51, np.uint8))
    assert np.all(half == 204)


def test_random_crops_are_those_of_seed_content_and_repeat(tmp_path):
    rgba = random_picture(64, 256, channels=4)
    rgba[..., 3] = rgba[..., 0]  # shows whether picture and mask are cut alike
    Image.fromarray(rgba).save(tmp_path / "b.png")
    (one,) = placed(tmp_path, random_crop=True, alpha_mask=True)
    crops = [pictures.prepare(one, seed, repeat) for seed, repeat in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(np.array_equal(picture[..., 0], mask) for picture, mask in crops)
    first, other_repeat, other_seed, again = (picture for picture, _ in crops)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other_repeat)
    assert not np.array_equal(first, other_seed)
    write_pictures(tmp_path, {"a.png": (32, 32)})  # comes before it now
    _, moved = placed(tmp_path, random_crop=True, alpha_mask=True)
    assert np.array_equal(pictures.prepare(moved, 0, 0)[0], first)


def test_colours_vary_a_little(tmp_path):
    Image.fromarray(np.full((64, 64, 3), (180, 90, 60), np.uint8)).save(tmp_path / "a.png")
    (one,) = placed(tmp_path, color_aug=True)
    colours = [pictures.prepare(one, 0, repeat)[0][0, 0].astype(int) for repeat in range(8)]
    assert len({tuple(colour) for colour in colours}) == 8
    assert np.abs(np.array(colours) - (180, 90, 60)).max() < 40
    assert np.array_equal(pictures.prepare(one, 0, 3)[0][0, 0], colours[3])


def test_damaged_pictures_are_refused_by_name(tmp_path):
    """All at once, before the training: absent, cut short, no picture, nothing to see."""
    write_pictures(tmp_path, {"good.png": (64, 64), "cut.jpg": (64, 64)})
    (good,) = [each for each in placed(tmp_path) if each.sample.name.endswith("good.png")]
    Image.fromarray(random_picture(seed=9)).save(tmp_path / "good.png")
    with pytest.raises(FluxError, match=r"good\.png has changed"):
        pictures.prepare(good, 0, 0)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "none.png").write_bytes(b"nothing")
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    rows = [
        f'{{"image": "{name}", "prompt": "x"}}' for name in ("none.png", "absent.png", "cut.jpg", "clear.png")
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    with pytest.raises(FluxError) as error:
        placed(tmp_path)
    for words in (
        "4 picture(s)",
        "none.png is not a picture",
        "absent.png: No such file",
        "cut.jpg: image file is truncated",
        "clear.png: the picture is all transparent",
    ):
        assert words in str(error.value)
