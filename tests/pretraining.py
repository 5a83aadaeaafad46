"""A miniature training from scratch: a dozen pictures of 16x16 and networks of a few thousand numbers."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux.training.pretrain.config import Config
from flux.training.pretrain.validate import load

SIDE = 16
MODEL = {
    "autoencoder": {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4},
    "discriminator": {"channels": 8, "layers": 2, "norm_groups": 4},
    "transformer": {
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
    },
    "clip": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "t5_length": 12,
    "clip_merges": 20,
    "t5_vocabulary": 60,
}


def write_pictures(folder: Path, count: int = 12) -> Path:
    """PNGs of a square on a flat ground, and captions.tsv."""
    rng, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = rng.integers(0, 255, 3).astype(np.uint8)
        picture = np.zeros((SIDE, SIDE, 3), np.uint8) + colour
        picture[4:9, 4:9] = 255 - colour
        Image.fromarray(picture).save(folder / f"{i}.png")
        lines.append(f"{i}.png\ta picture with the number {i}\n")
    (folder / "captions.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def tables(folder: Path, *steps: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The tables of a config over the pictures in folder/data, with these steps; sections are merged in."""
    made = {
        "model": copy.deepcopy(MODEL),
        "data": {"data_path": str(folder / "data"), "captions_file": "captions.tsv", "img_size": SIDE},
        "training": {
            "seed": 3,
            "workers": 0,
            "pipeline": {"defaults": {"batch_size": 4, "lr": 1e-3}, "steps": list(steps)},
        },
        "output": {
            "output_path": str(folder / "run"),
            "log_interval": 1,
            "checkpoint_save_interval": 100,
            "samples_per_checkpoint": 0,
            "sample_steps": 2,
        },
    }
    for name, section in sections.items():
        made.setdefault(name, {}).update(section)
    return made


def write(folder: Path, *steps: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """The config as a file, and its pictures."""
    if not (folder / "data").is_dir():
        write_pictures(folder / "data")
    path = folder / "config.json"
    path.write_text(json.dumps(tables(folder, *steps, **sections)), encoding="utf-8")
    return path


def config(folder: Path, *steps: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return load(write(folder, *steps, **sections))
