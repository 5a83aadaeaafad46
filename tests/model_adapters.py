"""Adapter files for `tiny_pipeline`'s model: random changes of its layers, by name."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from flux.adapters import Adapter, Delta, LowRank, save

from . import tiny

HIDDEN = tiny.FLUX.hidden_size
FLOW = {
    "img_in": (HIDDEN, 64),
    "txt_in": (HIDDEN, 48),
    "double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.1.txt_mlp.2": (HIDDEN, 4 * HIDDEN),
    "single_blocks.0.linear1": (7 * HIDDEN, HIDDEN),
    "single_blocks.2.linear2": (HIDDEN, 5 * HIDDEN),
}
MODULATION = {
    "time_in.in_layer": (HIDDEN, 256),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "guidance_in.out_layer": (HIDDEN, HIDDEN),
    "double_blocks.0.img_mod.lin": (6 * HIDDEN, HIDDEN),
    "double_blocks.1.txt_mod.lin": (6 * HIDDEN, HIDDEN),
    "single_blocks.1.modulation.lin": (3 * HIDDEN, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
CLIP = {
    "text_model.encoder.layers.0.mlp.fc1": (96, 32),
    "text_model.encoder.layers.1.self_attn.v_proj": (32, 32),
}
T5 = {
    "encoder.block.0.layer.0.SelfAttention.q": (32, 48),
    "encoder.block.1.layer.1.DenseReluDense.wo": (48, 96),
}


def make(shapes: dict[str, tuple[int, int]], seed: int = 0, rank: int = 3) -> Adapter:
    """LoRA of alpha 2 for these layers, given as name -> (rows, columns)."""
    rng = np.random.default_rng(seed)
    modules = {}
    for name, (rows, columns) in shapes.items():
        down, up = (rng.standard_normal(s, dtype=np.float32) for s in ((rank, columns), (rows, rank)))
        modules[name] = Delta(LowRank(mx.array(down) / columns**0.5, mx.array(up) / 2, 2.0))
    return Adapter(modules)


def write(path: Path, shapes: dict[str, tuple[int, int]], seed: int = 0, format: str = "native") -> Path:
    save(path, make(shapes, seed), format)
    return path
