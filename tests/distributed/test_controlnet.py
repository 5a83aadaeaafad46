"""ControlNets on several ranks: whole on each, where the model is split and where pictures are shared out."""

import json

import numpy as np
import pytest

from flux import images

from .. import controlnets, tiny_pipeline
from .launch import ROOT, TIMEOUT, by_hand

OPTIONS = ("--model", "model", "--controlnet", "net", "--control", "control.png", "--control-mode", "tile")
OPTIONS = (*OPTIONS, "--seed", 5, "--image-size", "32x48", "--steps", 2, "--save-raw", "a red apple")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model, a ControlNet and a control picture."""
    folder = tmp_path_factory.mktemp("shared")
    tiny_pipeline.write_checkpoint(folder)
    network = controlnets.make("union")
    controlnets.write_ours(folder / "net" / "c.safetensors", network)
    (folder / "net" / "config.json").write_text(json.dumps({"axes_dims_rope": list(network.params.axes_dim)}))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    images.save(folder / "control.png", pixels)
    return folder


def made(folder, shared, size: int, count: int) -> list[np.ndarray]:
    """So many pictures by so many ranks; the control picture is rank 0's alone."""
    for rank in range(size):
        (folder / f"rank{rank}").mkdir(parents=True)
        for name in ("model", "net", *(["control.png"] if rank == 0 else [])):
            (folder / f"rank{rank}" / name).symlink_to(shared / name)
    command = [ROOT / "txt2image.py", *OPTIONS, "--n-images", count]
    with by_hand(size, command, folder, own_folders=True) as ranks:
        for rank in ranks:
            _, err = rank.communicate(timeout=TIMEOUT)
            assert rank.returncode == 0, err
    return [images.load(folder / "rank0" / f"out.{i}.png")[0] for i in range(count)]


def test_split_and_shared_out_pictures_are_those_of_one(tmp_path, shared):
    alone = made(tmp_path / "alone", shared, 1, 2)
    several = made(tmp_path / "shared out", shared, 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(alone, several, strict=True))
    split = made(tmp_path / "split", shared, 2, 1)[0]
    assert np.abs(alone[0].astype(int) - split).max() <= 1  # the rounding to 8 bits
