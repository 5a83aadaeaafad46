"""The CLIP text encoder (Radford et al. 2021, arXiv:2103.00020): FLUX takes its pooled vector as guidance.

A causal pre-norm transformer over 77 tokens. Attribute names are those of transformers' checkpoints
(`text_model.encoder.layers.0.self_attn.q_proj`), so that loading needs no renaming.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.models.layers import gelu


@dataclass(frozen=True)
class CLIPEncoderParams:
    """The shape of the layers, of either encoder."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPTextParams(CLIPEncoderParams):
    """The shape of the network; the defaults are CLIP ViT-L/14's."""

    max_position_embeddings: int = 77
    vocab_size: int = 49408


@dataclass(frozen=True)
class CLIPOutput:
    """What the encoder gives for B texts of L tokens.

    pooled_output (B, C): the last hidden state at each text's first end token.
    last_hidden_state (B, L, C): after the final norm.
    hidden_states: the embeddings and every layer's output, (B, L, C) each, none of them normed.
    """

    pooled_output: mx.array
    last_hidden_state: mx.array
    hidden_states: list[mx.array]


def quick_gelu(x: mx.array) -> mx.array:
    """OpenAI CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * mx.sigmoid(1.702 * x)


# By transformers' names; the third is SigLIP's.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.gelu, "gelu_pytorch_tanh": gelu}


class CLIPTextEmbeddings(nn.Module):
    """Embeddings of tokens and of positions, added. Tokens (B, L) -> (B, L, C)."""

    def __init__(self, params: CLIPTextParams):
        super().__init__()
        self.token_embedding = nn.Embedding(params.vocab_size, params.hidden_size)
        self.position_embedding = nn.Embedding(params.max_position_embeddings, params.hidden_size)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        return self.token_embedding(tokens) + self.position_embedding.weight[:length]  # (B, L, C)


class CLIPAttention(nn.Module):
    """Multi-head self-attention. (B, L, C) -> the same."""

    def __init__(self, params: CLIPEncoderParams, mask: str | None):
        super().__init__()
        self._mask = mask
        self._head_dim = params.hidden_size // params.num_attention_heads
        self.q_proj = nn.Linear(params.hidden_size, params.hidden_size)
        self.k_proj = nn.Linear(params.hidden_size, params.hidden_size)
        self.v_proj = nn.Linear(params.hidden_size, params.hidden_size)
        self.out_proj = nn.Linear(params.hidden_size, params.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        # (B, L, C) -> 3 x (B, H, L, D)
        q, k, v = (self._split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._head_dim**-0.5, mask=self._mask)
        return self.out_proj(out.swapaxes(1, 2).flatten(2))  # (B, H, L, D) -> (B, L, C)

    def _split_heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (-1, self._head_dim)).swapaxes(1, 2)


class CLIPMLP(nn.Module):
    """Feed-forward: two layers with an activation between. (..., C) -> (..., C)."""

    def __init__(self, params: CLIPEncoderParams):
        super().__init__()
        self._activation = ACTIVATIONS[params.hidden_act]
        self.fc1 = nn.Linear(params.hidden_size, params.intermediate_size)
        self.fc2 = nn.Linear(params.intermediate_size, params.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and feed-forward, a norm before each. (B, L, C) -> the same."""

    def __init__(self, params: CLIPEncoderParams, mask: str | None):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)
        self.self_attn = CLIPAttention(params, mask)
        self.layer_norm2 = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)
        self.mlp = CLIPMLP(params)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers of either encoder. mask: "causal" for texts, None where every token sees all."""

    def __init__(self, params: CLIPEncoderParams, mask: str | None = "causal"):
        super().__init__()
        self.layers = [CLIPEncoderLayer(params, mask) for _ in range(params.num_hidden_layers)]


class CLIPTextTransformer(nn.Module):
    """Embeddings, encoder and final norm, under the names of transformers' checkpoints."""

    def __init__(self, params: CLIPTextParams):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(params)
        self.encoder = CLIPEncoder(params)
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)

    def __call__(self, tokens: mx.array, eos_token_id: int) -> CLIPOutput:
        hidden_states = [self.embeddings(tokens)]
        for layer in self.encoder.layers:
            hidden_states.append(layer(hidden_states[-1]))
        last = self.final_layer_norm(hidden_states[-1])
        pooled = last[mx.arange(len(tokens)), end_positions(tokens, eos_token_id)]  # (B, L, C) -> (B, C)
        return CLIPOutput(pooled, last, hidden_states)


class CLIPTextModel(nn.Module):
    """The CLIP text encoder, without the projection into the space it shares with pictures.

    Raises FluxError for an activation that CLIP's configurations do not use.
    """

    def __init__(self, params: CLIPTextParams):
        super().__init__()
        if params.hidden_act not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise FluxError(f"CLIP's hidden_act is {params.hidden_act!r}; this program knows {known}")
        self.params = params
        self.text_model = CLIPTextTransformer(params)

    def __call__(self, tokens: mx.array, eos_token_id: int) -> CLIPOutput:
        """Encodes tokens (B, L), L at most max_position_embeddings, in the weights' type.

        eos_token_id is the end token's id, at which the pooled vector is read; 2 has another
        meaning, see `end_positions`.
        """
        return self.text_model(tokens, eos_token_id)


def end_positions(tokens: mx.array, eos_token_id: int) -> mx.array:
    """Where each text of (B, L) tokens ends: the index (B,) of its first end token.

    The first configurations of CLIP say eos_token_id = 2, which is not the end token's id. As in
    transformers, 2 therefore means "the highest id in the text", which the end token is in CLIP's vocabulary.
    """
    if eos_token_id == 2:
        return tokens.argmax(axis=-1)
    return (tokens == eos_token_id).argmax(axis=-1)  # argmax gives the first of equals
