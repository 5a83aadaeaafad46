"""The Flux transformer: noisy packed latent, text and time in, velocity (noise - picture) out."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.models.layers import (
    Attend,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    clip_float16,
    rotary_tables,
    silu,
    sinusoidal_embedding,
)

TIME_DIM = 256  # size of the sinusoidal embedding of time and guidance
TIME_FACTOR = 1000  # time and guidance enter the embedding a thousandfold


# How time and guidance are rounded before they are embedded, where the model computes in 16 bits: the types
# of each, None for the model's. BFL's code does it in the model's type, which was bfloat16 in training: so
# that stands first, also for float16. diffusers does the same in float16, ComfyUI rounds guidance alone.
ROUNDINGS: dict[str, tuple[mx.Dtype | None, mx.Dtype | None]] = {
    "bfloat16": (mx.bfloat16, mx.bfloat16),
    "diffusers": (None, None),
    "none": (mx.float32, mx.float32),
    "comfyui": (mx.float32, None),
}


@dataclass(frozen=True)
class FluxParams:
    """The shape of a Flux transformer; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise FluxError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        head_dim = self.hidden_size // self.num_heads
        if sum(self.axes_dim) != head_dim or any(dim % 2 for dim in self.axes_dim):
            raise FluxError(
                f"axes_dim {self.axes_dim} must be even numbers with the sum {head_dim}, the head size"
            )


class ModulationVectors(NamedTuple):
    """Shifts, scales and gates of all layers, from time, guidance and pooled text; C is the hidden size.

    A tuple of arrays, so that `mx.eval` takes it. Before `step` every array has a leading axis of steps.
    """

    double: list[tuple[mx.array, mx.array]]  # a block: for txt and for img, (B, 1, 6*C) each
    single: list[mx.array]  # a block: (B, 1, 3*C)
    final: mx.array  # (B, 1, 2*C)

    def step(self, t: int) -> "ModulationVectors":
        """The vectors of step t, of those of all steps."""
        double = [(txt[t], img[t]) for txt, img in self.double]
        return ModulationVectors(double, [vectors[t] for vectors in self.single], self.final[t])


class Residuals(NamedTuple):
    """What ControlNets add to the picture's tokens after each double and each single block, (B, L, C) each.

    [] adds nothing after such blocks. `mx.eval` takes it.
    """

    double: list[mx.array]
    single: list[mx.array]


def add_residual(x: mx.array, residuals: list[mx.array], block: int, start: int = 0) -> mx.array:
    """x (B, L, C) with a block's residual (B or 1, l, C) added to its tokens from `start`.

    x itself where there are no residuals.
    """
    if not residuals:
        return x
    stop = start + residuals[block].shape[1]
    changed = clip_float16(x[:, start:stop] + residuals[block])
    return mx.concatenate([x[:, :start], changed, x[:, stop:]], axis=1)


def _given(attend: Attend | None) -> dict[str, Attend]:
    """`attend` for a block, if there is one; else arrays alone, as wrappers of blocks expect."""
    return {"attend": attend} if attend else {}


class Backbone(nn.Module):
    """What the transformer and its ControlNets have in common: embedders, blocks and their modulation.

    Computes in the type of its weights.

    `round_embeddings`: BFL's and diffusers' code scales time and guidance by 1000 in bfloat16, where 3.5
    becomes 3504. The published weights are used to that, so 16-bit weights get the same rounding; float32 is
    exact. `time_dtype`, `guidance_dtype`: the types that it is done in; float32 is no rounding.
    """

    def __init__(self, params: FluxParams):
        super().__init__()
        self.params = params
        self.round_embeddings = True
        self.time_dtype = self.guidance_dtype = mx.bfloat16  # also of float16 weights: made to run with it
        size, mlp_size = params.hidden_size, int(params.hidden_size * params.mlp_ratio)
        self.img_in = nn.Linear(params.in_channels, size)
        self.time_in = MLPEmbedder(TIME_DIM, size)
        self.vector_in = MLPEmbedder(params.vec_in_dim, size)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_DIM, size)
        self.txt_in = nn.Linear(params.context_in_dim, size)
        self.double_blocks = [
            DoubleStreamBlock(size, params.num_heads, mlp_size, params.qkv_bias) for _ in range(params.depth)
        ]
        self.single_blocks = [
            SingleStreamBlock(size, params.num_heads, mlp_size) for _ in range(params.depth_single_blocks)
        ]

    @property
    def dtype(self) -> mx.Dtype:
        """The working type. Read from a norm: Linear weights may be quantized or wrapped by an adapter."""
        block = self.double_blocks[0].img_attn if self.double_blocks else self.single_blocks[0]
        return block.norm.query_norm.scale.dtype

    def over_heads(self, sums: mx.array) -> mx.array:
        """Sums over all of the heads. A method, so that what splits the heads can replace it."""
        return sums

    # Once a picture: nothing here depends on the noisy latent.

    def embed_text(self, txt: mx.array) -> mx.array:
        """T5's features (B, Lt, context_in_dim) -> (B, Lt, hidden_size)."""
        return self.txt_in(txt.astype(self.dtype))

    def positions(self, txt_ids: mx.array, img_ids: mx.array) -> mx.array:
        """Positions (B or 1, Lt, 3) and (B or 1, Li, 3) -> rotary tables of both, text first, in float32."""
        if txt_ids.shape[0] != img_ids.shape[0]:
            batch = max(txt_ids.shape[0], img_ids.shape[0])
            txt_ids, img_ids = (mx.broadcast_to(i, (batch, *i.shape[1:])) for i in (txt_ids, img_ids))
        ids = mx.concatenate([txt_ids, img_ids], axis=1)  # (B, Lt+Li, 3)
        return rotary_tables(ids, self.params.axes_dim, self.params.theta)

    def modulation(
        self, timesteps: mx.array, y: mx.array, guidance: mx.array | None = None
    ) -> list[ModulationVectors]:
        """The vectors of all steps in one batch: timesteps (T,), y (B, vec_in_dim), guidance (B,) or (1,).

        Returns those of each of the T steps, for a batch of B pictures (B = 1 serves any batch).
        """
        if guidance is not None:
            guidance = guidance[None]
        every_step = self._vectors(self._silu_vec(timesteps[:, None], y[None], guidance))  # from (T, B, C)
        return [every_step.step(t) for t in range(timesteps.shape[0])]

    def drop_modulation(self) -> None:
        """Lets go of the weights that only modulation needs, 27.6 % of FLUX.1-dev; a step still works.

        The memory is free once the vectors made before have been evaluated.
        """
        for name in ("time_in", "vector_in", "guidance_in"):
            self.pop(name, None)
        for block in self.double_blocks:
            block.pop("img_mod", None)
            block.pop("txt_mod", None)
        for single_block in self.single_blocks:
            single_block.pop("modulation", None)

    def _silu_vec(self, timesteps: mx.array, y: mx.array, guidance: mx.array | None) -> mx.array:
        """silu of the conditioning vector. timesteps and guidance (...), y (..., vec_in_dim) -> (..., C)."""
        if "time_in" not in self:
            raise RuntimeError("the modulation weights were let go (drop_modulation): load the model again")
        vec = self.time_in(self._embed(timesteps, self.time_dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("this model has a guidance embedder: it needs guidance")
            vec = vec + self.guidance_in(self._embed(guidance, self.guidance_dtype))
        return silu(vec + self.vector_in(y.astype(self.dtype)))

    def _embed(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        """Time or guidance (...), scaled in dtype -> sinusoidal embedding (..., 256) in the working type."""
        if self.round_embeddings and self.dtype != mx.float32:
            x = x.astype(dtype)
        return sinusoidal_embedding(x * TIME_FACTOR, TIME_DIM).astype(self.dtype)

    def _vectors(self, silu_vec: mx.array) -> ModulationVectors:
        """(..., C) -> the vectors of every layer, with the same leading axes."""
        return ModulationVectors(
            [(block.txt_mod(silu_vec), block.img_mod(silu_vec)) for block in self.double_blocks],
            [block.modulation(silu_vec) for block in self.single_blocks],
            self._final_vectors(silu_vec),
        )

    def _final_vectors(self, silu_vec: mx.array) -> mx.array:
        """(..., C) -> the final layer's vectors (..., 1, 2*C); without such a layer they have no width."""
        return mx.zeros((*silu_vec.shape[:-1], 1, 0), silu_vec.dtype)


class Flux(Backbone):
    """FLUX.1's transformer."""

    def __init__(self, params: FluxParams):
        super().__init__(params)
        self.final_layer = LastLayer(params.hidden_size, params.out_channels)

    def __call__(
        self,
        img: mx.array,
        img_ids: mx.array,
        txt: mx.array,
        txt_ids: mx.array,
        timesteps: mx.array,
        y: mx.array,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """The velocity noise - picture at the given times: `denoise` with all that it needs.

        img (B, Li, in_channels), the packed noisy latent; img_ids (B or 1, Li, 3);
        txt (B, Lt, context_in_dim), T5's features; txt_ids (B or 1, Lt, 3);
        timesteps (B,), from 1 (noise) to 0; y (B, vec_in_dim), CLIP's pooled vector;
        guidance (B,), needed where the model has the embedder and otherwise ignored.
        Returns (B, Li, out_channels).
        """
        vectors = self._vectors(self._silu_vec(timesteps, y, guidance))
        return self.denoise(img, self.embed_text(txt), self.positions(txt_ids, img_ids), vectors)

    def drop_modulation(self) -> None:
        """As of a `Backbone`, and of the final layer."""
        super().drop_modulation()
        self.final_layer.pop("adaLN_modulation", None)

    def denoise(
        self,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        vectors: ModulationVectors,
        residuals: Residuals | None = None,
        attend: Attend | None = None,
    ) -> mx.array:
        """The velocity (B, Li, out_channels) for img (B, Li, in_channels) at the vectors' time.

        txt, pe and vectors come from `embed_text`, `positions` and `modulation`. residuals: ControlNets', for
        each block of either kind, or [] for none; they are added to the first tokens of img. attend: takes
        the place of attention, if given.
        """
        told = (pe, vectors, residuals, attend)
        txt, img = self.first_block(txt, self.embed_picture(img), *told)
        return self.velocity(self.other_blocks(txt, img, *told), vectors)

    # The parts of `denoise`, each of which takes what the one before gives; C is the hidden size.

    def embed_picture(self, img: mx.array) -> mx.array:
        """img (B, Li, in_channels) -> (B, Li, C) in the working type."""
        return self.img_in(img.astype(self.dtype))

    def first_block(
        self,
        txt: mx.array,
        img: mx.array,
        pe: mx.array,
        vectors: ModulationVectors,
        residuals: Residuals | None = None,
        attend: Attend | None = None,
    ) -> tuple[mx.array, mx.array]:
        """txt (B, Lt, C) and img (B, Li, C) after the first double block; the others: see `denoise`."""
        return self._double(slice(1), txt, img, pe, vectors, residuals, attend)

    def other_blocks(
        self,
        txt: mx.array,
        img: mx.array,
        pe: mx.array,
        vectors: ModulationVectors,
        residuals: Residuals | None = None,
        attend: Attend | None = None,
    ) -> mx.array:
        """img (B, Li, C) after all blocks, from txt (B, Lt, C) and img after the first double block."""
        txt, img = self._double(slice(1, None), txt, img, pe, vectors, residuals, attend)
        added = [] if residuals is None else residuals.single
        x = mx.concatenate([txt, img], axis=1)  # (B, Lt+Li, C)
        for i, (block, mod) in enumerate(zip(self.single_blocks, vectors.single, strict=True)):
            x = add_residual(block(x, pe, mod, **_given(attend)), added, i, start=txt.shape[1])
        return x[:, txt.shape[1] :]

    def velocity(self, img: mx.array, vectors: ModulationVectors) -> mx.array:
        """img (B, Li, C) after all blocks -> (B, Li, out_channels)."""
        return self.final_layer(img, vectors.final)

    def _double(
        self,
        part: slice,
        txt: mx.array,
        img: mx.array,
        pe: mx.array,
        vectors: ModulationVectors,
        residuals: Residuals | None,
        attend: Attend | None,
    ) -> tuple[mx.array, mx.array]:
        """txt (B, Lt, C) and img (B, Li, C) after a part of the double blocks."""
        added = [] if residuals is None else residuals.double[part]
        pairs = zip(self.double_blocks[part], vectors.double[part], strict=True)
        for i, (block, (txt_mod, img_mod)) in enumerate(pairs):
            txt, img = block(txt, img, pe, txt_mod, img_mod, **_given(attend))
            img = add_residual(img, added, i)
        return txt, img

    def _final_vectors(self, silu_vec: mx.array) -> mx.array:
        return self.final_layer.shift_and_scale(silu_vec)
