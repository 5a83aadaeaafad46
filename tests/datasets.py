"""Small data sets that tests make: pictures, lists and a data.toml."""

from pathlib import Path

import numpy as np
from PIL import Image

OPTIONS = {"resolution": (64, 64)}


def random_picture(height=64, width=64, seed=0, channels=3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Pictures of noise by their names, (height, width); no two of them alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        Image.fromarray(random_picture(height, width, seed)).save(folder / name)
    return folder


def write_toml(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.toml").write_text(text)
    return folder / "data.toml"


def two_concepts(shared: Path, folder: Path) -> Path:
    """The two-concept set's data.toml as its users have it: in flux_data/ of the working folder."""
    (folder / "flux_data").symlink_to(shared / "data/two_concepts")
    return folder / "flux_data" / "data.toml"
