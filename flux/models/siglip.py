"""SigLIP's vision transformer (Zhai et al. 2023, arXiv:2303.15343): pictures -> features of their patches.

Its layers are CLIP's with another activation; there is no class token and no norm before them. Attribute
names are those of transformers' SiglipVisionModel. The attention that pools the features into one vector is
left out: FLUX.1 Redux reads the patches.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.models.clip import ACTIVATIONS, CLIPEncoder, CLIPEncoderParams


@dataclass(frozen=True)
class SiglipParams(CLIPEncoderParams):
    """The shape of the network; the defaults are so400m-patch14-384's, which Redux was trained with."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    image_size: int = 384
    patch_size: int = 14

    @property
    def tokens(self) -> int:
        """How many patches a picture has; pixels beyond the last whole patch are not seen."""
        return (self.image_size // self.patch_size) ** 2


class SiglipEmbeddings(nn.Module):
    """The patches with positions. Pictures (B, S, S, 3) -> (B, N, C)."""

    def __init__(self, params: SiglipParams):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, params.hidden_size, params.patch_size, stride=params.patch_size)
        self.position_embedding = nn.Embedding(params.tokens, params.hidden_size)

    def __call__(self, pictures: mx.array) -> mx.array:
        patches = self.patch_embedding(pictures).flatten(1, 2)  # (B, S', S', C) -> (B, N, C)
        return patches + self.position_embedding.weight


class SiglipVision(nn.Module):
    """Normalized square pictures (B, S, S, 3) -> the features (B, N, C) of their patches, row by row.

    Raises FluxError for an activation that is not known.
    """

    def __init__(self, params: SiglipParams):
        super().__init__()
        if params.hidden_act not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise FluxError(f"SigLIP's hidden_act is {params.hidden_act!r}; this program knows {known}")
        self.params = params
        self.embeddings = SiglipEmbeddings(params)
        self.encoder = CLIPEncoder(params, mask=None)
        self.post_layernorm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)

    def __call__(self, pictures: mx.array) -> mx.array:
        x = self.embeddings(pictures)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)
