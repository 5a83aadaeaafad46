"""CLIP's vision transformer (Radford et al. 2021, arXiv:2103.00020): pictures -> features that texts share.

Attribute names are those of transformers' CLIPModel, the spelling of `pre_layrnorm` too.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.clip import CLIPEncoder, CLIPEncoderParams


@dataclass(frozen=True)
class CLIPVisionParams(CLIPEncoderParams):
    """The shape of the network; the defaults are CLIP ViT-B/32's."""

    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512


class CLIPVisionEmbeddings(nn.Module):
    """A class token and the patches, with positions. Pictures (B, H, W, 3) -> (B, 1 + patches, C)."""

    def __init__(self, params: CLIPVisionParams):
        super().__init__()
        width, patch = params.hidden_size, params.patch_size
        self.class_embedding = mx.zeros((width,))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((params.image_size // patch) ** 2 + 1, width)

    def __call__(self, pictures: mx.array) -> mx.array:
        patches = self.patch_embedding(pictures).flatten(1, 2)  # (B, S, S, 3) -> (B, N, C)
        first = mx.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[2]))
        return mx.concatenate([first, patches], axis=1) + self.position_embedding.weight  # (B, N + 1, C)


class CLIPVisionTransformer(nn.Module):
    """Embeddings, encoder and norms, under the names of transformers' checkpoints."""

    def __init__(self, params: CLIPVisionParams):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(params)
        self.pre_layrnorm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)
        self.encoder = CLIPEncoder(params, mask=None)
        self.post_layernorm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)

    def __call__(self, pictures: mx.array) -> mx.array:
        x = self.pre_layrnorm(self.embeddings(pictures))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])  # of the class token: (B, C)


class CLIPVision(nn.Module):
    """Normalized square pictures (B, S, S, 3) -> their features (B, projection_dim), of any length."""

    def __init__(self, params: CLIPVisionParams):
        super().__init__()
        self.params = params
        self.vision_model = CLIPVisionTransformer(params)
        self.visual_projection = nn.Linear(params.hidden_size, params.projection_dim, bias=False)

    def __call__(self, pictures: mx.array) -> mx.array:
        return self.visual_projection(self.vision_model(pictures))
