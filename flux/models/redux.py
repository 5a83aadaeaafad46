"""FLUX.1 Redux (Black Forest Labs 2024): a picture's features -> tokens that the transformer reads as text.

Attribute names are those of BFL's checkpoint, which diffusers shares.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.layers import silu


@dataclass(frozen=True)
class ReduxParams:
    """How wide SigLIP's features and T5's are; the defaults are FLUX.1-Redux-dev's."""

    redux_dim: int = 1152
    txt_in_features: int = 4096


class ReduxImageEncoder(nn.Module):
    """Features (B, N, redux_dim) -> tokens (B, N, txt_in_features)."""

    def __init__(self, params: ReduxParams):
        super().__init__()
        self.params = params
        self.redux_up = nn.Linear(params.redux_dim, 3 * params.txt_in_features)
        self.redux_down = nn.Linear(3 * params.txt_in_features, params.txt_in_features)

    def __call__(self, features: mx.array) -> mx.array:
        return self.redux_down(silu(self.redux_up(features)))
