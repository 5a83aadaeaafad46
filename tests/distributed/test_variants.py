"""Models that are given pictures on several ranks: shared out, and split."""

import numpy as np
import pytest

from flux import images

from .. import tiny_pipeline
from .launch import ROOT, TIMEOUT, by_hand

FILL = ("--model", "./fill", "--image", "a.png", "--mask", "mask.png")
CANNY = ("--model", "./canny", "--control", "a.png", "--image-size", "32x48")
OPTIONS = ("--seed", 5, "--steps", 2, "--save-raw", "a red apple")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two models and their pictures."""
    folder = tmp_path_factory.mktemp("shared")
    for row in ("fill", "canny"):
        tiny_pipeline.write_checkpoint(folder / f"{row} checkpoint", row=row)
        (folder / row).symlink_to(folder / f"{row} checkpoint" / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    images.save(folder / "a.png", pixels)
    images.save(folder / "mask.png", np.pad(np.full((16, 16, 3), 255, np.uint8), ((8, 8), (16, 16), (0, 0))))
    return folder


def made(folder, shared, size: int, count: int, options) -> list[np.ndarray]:
    """So many pictures by so many ranks; the given pictures are rank 0's alone."""
    for rank in range(size):
        (folder / f"rank{rank}").mkdir(parents=True)
        for name in ("fill", "canny", *(["a.png", "mask.png"] if rank == 0 else [])):
            (folder / f"rank{rank}" / name).symlink_to(shared / name)
    command = [ROOT / "txt2image.py", *options, *OPTIONS, "--n-images", count]
    with by_hand(size, command, folder, own_folders=True) as ranks:
        for rank in ranks:
            _, err = rank.communicate(timeout=TIMEOUT)
            assert rank.returncode == 0, err
    return [images.load(folder / "rank0" / f"out.{i}.png")[0] for i in range(count)]


@pytest.mark.parametrize("options", [FILL, CANNY])
def test_split_and_shared_out_pictures_are_those_of_one(tmp_path, shared, options):
    alone = made(tmp_path / "alone", shared, 1, 2, options)
    several = made(tmp_path / "shared out", shared, 2, 2, options)
    assert all(np.array_equal(a, b) for a, b in zip(alone, several, strict=True))
    split = made(tmp_path / "split", shared, 2, 1, options)[0]
    assert np.abs(alone[0].astype(int) - split).max() <= 1  # the rounding to 8 bits
