"""What the tests of adapter files share: layers of every shape, random matrices, files as dictionaries."""

import mlx.core as mx
import numpy as np

from flux.adapters import Adapter
from flux.adapters.formats import read

HIDDEN, MLP, RANK = 8, 32, 3
# A module of each shape: BFL's name -> (rows, columns).
SHAPES = {
    "double_blocks.1.img_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.txt_attn.proj": (HIDDEN, HIDDEN),
    "double_blocks.1.img_mlp.0": (MLP, HIDDEN),
    "double_blocks.0.txt_mlp.2": (HIDDEN, MLP),
    "double_blocks.0.txt_mod.lin": (6 * HIDDEN, HIDDEN),
    "single_blocks.2.linear1": (3 * HIDDEN + MLP, HIDDEN),
    "single_blocks.2.linear2": (HIDDEN, HIDDEN + MLP),
    "single_blocks.10.modulation.lin": (3 * HIDDEN, HIDDEN),
    "img_in": (HIDDEN, 4),
    "txt_in": (HIDDEN, 6),
    "time_in.in_layer": (HIDDEN, 5),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "guidance_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.linear": (4, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
CLIP_LAYER, T5_LAYER = (
    "text_model.encoder.layers.11.self_attn.q_proj",
    "encoder.block.23.layer.1.DenseReluDense.wi_0",
)

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def pair(rows: int, columns: int, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    return normal(rank, columns), normal(rows, rank)


def close(a: mx.array, b: np.ndarray) -> bool:
    return np.linalg.norm(np.array(a) - b) <= 1e-6 * np.linalg.norm(b)


def read_numpy(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, **options) -> Adapter:
    return read({name: mx.array(t) for name, t in tensors.items()}, metadata or {}, **options)


def lora(stem: str, rows: int = HIDDEN, columns: int = HIDDEN, **more: float) -> dict[str, np.ndarray]:
    down, up = pair(rows, columns)
    extra = {f"{stem}.{name}": np.array(value, np.float32) for name, value in more.items()}
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, **extra}


def dense(adapter: Adapter, module: str) -> mx.array:
    return adapter.modules[module].change.dense()
