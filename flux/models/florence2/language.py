"""BART, the language model of Florence-2 (Lewis et al. 2019, arXiv:1910.13461): an encoder and a decoder.

Both are post-norm transformers with learned positions. The encoder reads the picture's features and the
prompt as one sequence; the decoder writes the answer, a token at a time, with a cache of keys and values.
Attribute names are those of transformers' checkpoints.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.models.florence2.gelu import gelu

POSITION_OFFSET = 2  # the first two rows of BART's position tables are never used: its padding id was 1


@dataclass(frozen=True)
class LanguageParams:
    """The shape of the language model; the defaults are Florence-2-base's."""

    vocab_size: int = 51289
    d_model: int = 768
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 12
    decoder_attention_heads: int = 12
    encoder_ffn_dim: int = 3072
    decoder_ffn_dim: int = 3072
    max_position_embeddings: int = 1024


KeysValues = tuple[mx.array, mx.array]  # both (B, heads, length, D)


class DecoderCache:
    """What a step of the decoder needs of the earlier ones.

    cross: a layer's keys and values of what the encoder gave, for P pictures. past: a layer's keys and values
    of the tokens so far, for P * beams rows; a picture's rows stand together. mask: (P, 1, 1, S), True where
    the encoder's output holds no padding; None where it holds none at all.
    """

    def __init__(self, cross: list[KeysValues], mask: mx.array | None):
        self.cross = cross
        self.mask = mask
        self.past: list[KeysValues | None] = [None] * len(cross)

    @property
    def length(self) -> int:
        """The number of tokens that the cache holds."""
        first = self.past[0]
        return 0 if first is None else first[0].shape[2]

    def append(self, layer: int, new: KeysValues) -> KeysValues:
        """Adds the keys and values of new tokens to a layer's, and gives all of them."""
        old = self.past[layer]
        if old is not None:
            new = mx.concatenate([old[0], new[0]], axis=2), mx.concatenate([old[1], new[1]], axis=2)
        self.past[layer] = new
        return new

    def select(self, rows: list[int], pictures: list[int]) -> None:
        """Row i becomes what row rows[i] was, picture i what picture pictures[i] was."""
        filled = [keys_values for keys_values in self.past if keys_values is not None]
        if rows != list(range(filled[0][0].shape[0])):
            self.past = [_take(keys_values, rows) for keys_values in filled]
        if pictures != list(range(self.cross[0][0].shape[0])):
            self.cross = [_take(keys_values, pictures) for keys_values in self.cross]
            self.mask = None if self.mask is None else self.mask[mx.array(pictures, dtype=mx.int32)]


def _take(keys_values: KeysValues, rows: list[int]) -> KeysValues:
    index = mx.array(rows, dtype=mx.int32)  # the type must be said: the list may be empty
    return keys_values[0][index], keys_values[1][index]


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be kept (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self._head_dim = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def keys_values(self, x: mx.array) -> KeysValues:
        """(B, L, C) -> keys and values, (B, heads, L, D) each."""
        return self._split_heads(self.k_proj(x)), self._split_heads(self.v_proj(x))

    def __call__(self, x: mx.array, keys_values: KeysValues, mask: mx.array | str | None = None) -> mx.array:
        """x (R, L, C) attends to keys and values of P sequences, R a multiple of P -> (R, L, C).

        Where R > P, the R / P rows of a picture (its beams) line up as further queries to the one copy of
        its keys.
        """
        keys, values = keys_values
        q = self._split_heads(self.q_proj(x).reshape(keys.shape[0], -1, x.shape[-1]))
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=self._head_dim**-0.5, mask=mask)
        return self.out_proj(out.swapaxes(1, 2).reshape(x.shape))  # (P, heads, R / P * L, D) -> (R, L, C)

    def _split_heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (-1, self._head_dim)).swapaxes(1, 2)  # (B, L, C) -> (B, heads, L, D)


class EncoderLayer(nn.Module):
    """BART's: self-attention and feed-forward, a norm after each. (B, S, C) -> the same."""

    def __init__(self, params: LanguageParams):
        super().__init__()
        self.self_attn = Attention(params.d_model, params.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(params.d_model)
        self.fc1 = nn.Linear(params.d_model, params.encoder_ffn_dim)
        self.fc2 = nn.Linear(params.encoder_ffn_dim, params.d_model)
        self.final_layer_norm = nn.LayerNorm(params.d_model)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.self_attn_layer_norm(x + self.self_attn(x, self.self_attn.keys_values(x), mask))
        return self.final_layer_norm(x + self.fc2(gelu(self.fc1(x))))


class Encoder(nn.Module):
    """BART's encoder: learned positions and a stack of layers."""

    def __init__(self, params: LanguageParams):
        super().__init__()
        self.embed_positions = nn.Embedding(params.max_position_embeddings + POSITION_OFFSET, params.d_model)
        self.layernorm_embedding = nn.LayerNorm(params.d_model)
        self.layers = [EncoderLayer(params) for _ in range(params.encoder_layers)]

    def __call__(self, embeddings: mx.array, mask: mx.array | None = None) -> mx.array:
        """embeddings (B, S, C); mask (B, 1, 1, S), False at padding -> (B, S, C)."""
        x = embeddings + positions(self.embed_positions, 0, embeddings.shape[1])
        x = self.layernorm_embedding(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class DecoderLayer(nn.Module):
    """BART's: causal self-attention, attention to the encoder's output, feed-forward; a norm after each."""

    def __init__(self, params: LanguageParams):
        super().__init__()
        self.self_attn = Attention(params.d_model, params.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(params.d_model)
        self.encoder_attn = Attention(params.d_model, params.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(params.d_model)
        self.fc1 = nn.Linear(params.d_model, params.decoder_ffn_dim)
        self.fc2 = nn.Linear(params.decoder_ffn_dim, params.d_model)
        self.final_layer_norm = nn.LayerNorm(params.d_model)

    def __call__(self, x: mx.array, cache: DecoderCache, layer: int) -> mx.array:
        keys_values = cache.append(layer, self.self_attn.keys_values(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, keys_values, "causal"))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, cache.cross[layer], cache.mask))
        return self.final_layer_norm(x + self.fc2(gelu(self.fc1(x))))


class Decoder(nn.Module):
    """BART's decoder: learned positions and a stack of layers that fill a cache."""

    def __init__(self, params: LanguageParams):
        super().__init__()
        self.embed_positions = nn.Embedding(params.max_position_embeddings + POSITION_OFFSET, params.d_model)
        self.layernorm_embedding = nn.LayerNorm(params.d_model)
        self.layers = [DecoderLayer(params) for _ in range(params.decoder_layers)]

    def __call__(self, embeddings: mx.array, cache: DecoderCache) -> mx.array:
        """embeddings (R, L, C) of the tokens that follow those in the cache -> (R, L, C)."""
        x = embeddings + positions(self.embed_positions, cache.length, embeddings.shape[1])
        x = self.layernorm_embedding(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, cache, index)
        return x


class LanguageModel(nn.Module):
    """BART (Lewis et al. 2019) with one embedding for encoder, decoder and output."""

    def __init__(self, params: LanguageParams):
        super().__init__()
        self.shared = nn.Embedding(params.vocab_size, params.d_model)
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    @property
    def max_tokens(self) -> int:
        """The length of an answer at most: as many positions as were learned."""
        return self.decoder.embed_positions.weight.shape[0] - POSITION_OFFSET

    def cache(self, encoded: mx.array, mask: mx.array | None = None) -> DecoderCache:
        """The empty cache for answers about what the encoder gave: encoded (P, S, C), mask (P, 1, 1, S)."""
        cross = [layer.encoder_attn.keys_values(encoded) for layer in self.decoder.layers]
        return DecoderCache(cross, mask)

    def decode(self, tokens: mx.array, cache: DecoderCache) -> mx.array:
        """The next tokens (R, L) of every row, which go into the cache -> hidden states (R, L, C)."""
        return self.decoder(self.shared(tokens), cache)

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., C) -> scores (..., vocabulary): the embedding is the output layer as well."""
        return self.shared.as_linear(hidden)


def positions(table: nn.Embedding, start: int, length: int) -> mx.array:
    """(length, C): the embeddings of the positions from start on. Raises FluxError past the table's end."""
    end = start + length + POSITION_OFFSET
    if end > table.weight.shape[0]:
        limit = table.weight.shape[0] - POSITION_OFFSET
        raise FluxError(
            f"{start + length} tokens in a sequence; the captioner reads and writes {limit} at most"
        )
    return table.weight[start + POSITION_OFFSET : end]
