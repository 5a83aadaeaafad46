"""FluxFlow's sizes as those of FLUX's networks."""

from math import gcd
from typing import Any

# Its sizes with its defaults: numbers of a latent token, widths of the flow, of the discriminator, of a text.
SIZES = {"vae_dim": 128, "feature_maps_dim": 128, "feature_maps_dim_disc": 8, "text_embedding_dim": 1024}
FLOW_LAYERS = {"depth": 3, "depth_single_blocks": 7}  # ten as there, about as many of each kind as FLUX's
TEXT_LAYERS = 6  # DistilBERT's
HEAD, TEXT_HEAD = 128, 64  # widths of an attention head, at most


def networks(
    vae_dim: int, feature_maps_dim: int, feature_maps_dim_disc: int, text_embedding_dim: int
) -> dict[str, dict[str, Any]]:
    """FLUX's networks of these sizes.

    vae_dim: numbers of a token of 16x16 pixels, here 4 x z_channels, and the autoencoder's first width.
    feature_maps_dim: the flow's width. feature_maps_dim_disc: the discriminator's first width.
    text_embedding_dim: the width of both text encoders.
    """
    head = _head(feature_maps_dim, HEAD)
    time = 4 * max(1, round(head / 32))  # RoPE's axes: an eighth for the first, as in FLUX
    rest = (head - time) // 2
    heads = text_embedding_dim // _head(text_embedding_dim, TEXT_HEAD)
    return {
        "autoencoder": {"ch": vae_dim, "z_channels": vae_dim // 4, "norm_groups": gcd(vae_dim, 32)},
        "discriminator": {
            "channels": feature_maps_dim_disc,
            "norm_groups": gcd(feature_maps_dim_disc, 32),
        },
        "transformer": {
            "hidden_size": feature_maps_dim,
            "num_heads": feature_maps_dim // head,
            "axes_dim": [time, rest, rest],
            **FLOW_LAYERS,
        },
        "clip": {
            "hidden_size": text_embedding_dim,
            "intermediate_size": 4 * text_embedding_dim,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": heads,
        },
        "t5": {
            "d_model": text_embedding_dim,
            "d_kv": text_embedding_dim // heads,
            "d_ff": 4 * text_embedding_dim,
            "num_layers": TEXT_LAYERS,
            "num_heads": heads,
        },
    }


def _head(width: int, most: int) -> int:
    """The greatest head that divides the width."""
    return max(size for size in range(4, most + 1, 4) if width % size == 0)
