"""ControlNets of random weights for tests: of diffusers' own class, and ours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from flux.models.controlnet import ControlNet, ControlNetParams
from flux.weights import keymaps, tensors

from . import tiny
from .tiny_pipeline import FLUX

# Full-size configs. InstantX's and XLabs' are the config.json of InstantX/FLUX.1-dev-Controlnet-Union and
# XLabs-AI/flux-controlnet-*-diffusers; Union-Pro-2.0's model card says 6 double blocks, no single one and no
# mode; DiffSynth-Studio's table of models has 5 and 0 for jasperai's.
DEV = {"guidance_embeds": True}  # the rest is the class's default, FLUX.1-dev's widths
FULL = {
    "union": DEV | {"num_layers": 5, "num_single_layers": 10, "num_mode": 10},
    "union-pro-2": DEV | {"num_layers": 6, "num_single_layers": 0},
    "jasperai": DEV | {"num_layers": 5, "num_single_layers": 0},
    "xlabs": DEV
    | {"num_layers": 2, "num_single_layers": 0, "conditioning_embedding_channels": 16, "patch_size": 2},
}

SMALL = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "guidance_embeds": True,
}
KINDS = {
    "single": SMALL,
    "union": SMALL | {"num_mode": 7},
    "schnell": SMALL | {"guidance_embeds": False},
    "double only": SMALL | {"num_layers": 1, "num_single_layers": 0},
    "xlabs": SMALL | {"num_single_layers": 0, "conditioning_embedding_channels": 16, "patch_size": 2},
}


# Ours, for the model of tests/tiny_pipeline.py.
PARAMS = ControlNetParams(**vars(FLUX) | {"depth": 2, "depth_single_blocks": 1, "control_channels": 64})
OURS = {
    "single": PARAMS,
    "union": replace(PARAMS, modes=5),
    "xlabs": replace(PARAMS, depth_single_blocks=0, hint_channels=16),
}


def make(kind: str, seed: int = 0, **changes: Any) -> ControlNet:
    """Our network of a kind, with random weights."""
    network = ControlNet(replace(OURS[kind], **changes))
    tiny.randomize(network, seed)
    return network


def write_ours(path: Path, network: ControlNet, diffusers: bool = True) -> Path:
    """A network's file, with diffusers' names or with BFL's."""
    weights = dict(tree_flatten(network.parameters()))
    tensors.save(path, keymaps.to_file("controlnet", weights, diffusers))
    return path


def reference(kind: str, seed: int = 0, **changes: Any):
    """diffusers' network of a kind, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    return randomize(diffusers.FluxControlNetModel(**KINDS[kind] | changes), seed)


def randomize(module, seed: int):
    """Random weights that keep activations near 1, also of the layers that begin with zeros."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2, generator=generator)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
    return module.eval()


def write(folder: Path, kind: str, seed: int = 0, **changes):
    """diffusers' network, saved by it in a folder."""
    network = reference(kind, seed, **changes)
    network.save_pretrained(folder)
    return network
