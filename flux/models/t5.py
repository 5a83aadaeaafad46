"""The encoder of T5 v1.1 (Raffel et al. 2019, arXiv:1910.10683): FLUX reads the prompt's words from it.

A pre-norm transformer with RMSNorm and gated GELU, without biases in its linear layers. Attention scores are
not scaled; a learned bias by relative position, owned by the first block, serves all blocks. Attribute names
are those of transformers' checkpoints (`encoder.block.0.layer.0.SelfAttention.q`), so that loading needs no
renaming.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.layers import clip_float16, gelu


@dataclass(frozen=True)
class T5Params:
    """The shape of the network; the defaults are T5 v1.1 XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def relative_position_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """The row of the bias table for a key that lies `distance` tokens after (before, if < 0) its query.

    Half of the buckets are for keys after the query. Within each half, the first half of the buckets is for
    the exact distances 0, 1, 2, ..., and the others grow logarithmically up to max_distance; whatever is
    farther falls into the last.
    """
    num_buckets //= 2
    start = num_buckets if distance > 0 else 0
    distance = abs(distance)
    exact = num_buckets // 2
    if distance < exact:
        return start + distance
    growth = math.log(distance / exact) / math.log(max_distance / exact)
    return start + min(exact + int(growth * (num_buckets - exact)), num_buckets - 1)


class T5Attention(nn.Module):
    """Self-attention, unscaled, with a bias by distance (Raffel et al. 2020). (B, L, C) -> the same."""

    def __init__(self, params: T5Params, has_relative_attention_bias: bool):
        super().__init__()
        inner_dim = params.num_heads * params.d_kv
        self._params = params
        self.q = nn.Linear(params.d_model, inner_dim, bias=False)
        self.k = nn.Linear(params.d_model, inner_dim, bias=False)
        self.v = nn.Linear(params.d_model, inner_dim, bias=False)
        self.o = nn.Linear(inner_dim, params.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(
                params.relative_attention_num_buckets, params.num_heads
            )

    def position_bias(self, length: int) -> mx.array:
        """What is added to the scores of `length` queries (rows) and keys: (1, H, L, L)."""
        buckets = [
            relative_position_bucket(
                distance,
                self._params.relative_attention_num_buckets,
                self._params.relative_attention_max_distance,
            )
            for distance in range(1 - length, length)
        ]
        by_distance = self.relative_attention_bias(mx.array(buckets))  # (2L - 1, H)
        positions = mx.arange(length)
        offsets = positions[None, :] - positions[:, None] + length - 1  # (L, L), 0 for distance 1 - L
        return by_distance[offsets].transpose(2, 0, 1)[None]  # (L, L, H) -> (1, H, L, L)

    def __call__(self, x: mx.array, position_bias: mx.array) -> mx.array:
        # (B, L, C) -> 3 x (B, H, L, D)
        q, k, v = (self._split_heads(project(x)) for project in (self.q, self.k, self.v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=position_bias)
        return self.o(out.swapaxes(1, 2).flatten(2))  # (B, H, L, D) -> (B, L, C)

    def _split_heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (-1, self._params.d_kv)).swapaxes(1, 2)


class T5LayerSelfAttention(nn.Module):
    """A norm and self-attention, added to the input. (B, L, C) -> the same."""

    def __init__(self, params: T5Params, has_relative_attention_bias: bool):
        super().__init__()
        self.layer_norm = nn.RMSNorm(params.d_model, eps=params.layer_norm_epsilon)
        self.SelfAttention = T5Attention(params, has_relative_attention_bias)

    def __call__(self, x: mx.array, position_bias: mx.array) -> mx.array:
        return clip_float16(x + self.SelfAttention(self.layer_norm(x), position_bias))


class T5DenseGatedActDense(nn.Module):
    """Feed-forward with a gate: wo(gelu(wi_0(x)) wi_1(x)) (Shazeer 2020). (..., C) -> (..., C)."""

    def __init__(self, params: T5Params):
        super().__init__()
        self.wi_0 = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wi_1 = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wo = nn.Linear(params.d_ff, params.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        # Bounded before the product too: a closed gate times infinity would be NaN.
        gate, value = clip_float16(self.wi_0(x)), clip_float16(self.wi_1(x))
        return self.wo(clip_float16(gelu(gate) * value))


class T5LayerFF(nn.Module):
    """A norm and feed-forward, added to the input. (B, L, C) -> the same."""

    def __init__(self, params: T5Params):
        super().__init__()
        self.layer_norm = nn.RMSNorm(params.d_model, eps=params.layer_norm_epsilon)
        self.DenseReluDense = T5DenseGatedActDense(params)

    def __call__(self, x: mx.array) -> mx.array:
        return clip_float16(x + self.DenseReluDense(self.layer_norm(x)))


class T5Block(nn.Module):
    """Self-attention and feed-forward, as a list because the checkpoint numbers them."""

    def __init__(self, params: T5Params, has_relative_attention_bias: bool):
        super().__init__()
        self.layer = [T5LayerSelfAttention(params, has_relative_attention_bias), T5LayerFF(params)]

    def __call__(self, x: mx.array, position_bias: mx.array) -> mx.array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, position_bias))


class T5Stack(nn.Module):
    """The blocks and the final norm, under the checkpoint's names."""

    def __init__(self, params: T5Params):
        super().__init__()
        # Only the first block owns a table of relative positions.
        self.block = [T5Block(params, has_relative_attention_bias=i == 0) for i in range(params.num_layers)]
        self.final_layer_norm = nn.RMSNorm(params.d_model, eps=params.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        position_bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1])
        for block in self.block:
            x = block(x, position_bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1. The table of tokens is `shared`; files may call it `encoder.embed_tokens`."""

    def __init__(self, params: T5Params):
        super().__init__()
        self.params = params
        self.shared = nn.Embedding(params.vocab_size, params.d_model)
        self.encoder = T5Stack(params)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Encodes tokens (B, L) to (B, L, d_model), in the weights' type.

        Padding is not masked: FLUX was trained with text features made so.
        """
        return self.encoder(self.shared(tokens))
