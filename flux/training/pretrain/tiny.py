"""The shape of the built-in model and the numbers of its training: the recipe's one page of constants."""

from flux.models.autoencoder import AutoEncoderParams
from flux.models.clip import CLIPTextParams
from flux.models.t5 import T5Params
from flux.models.transformer import FluxParams

AUTOENCODER = AutoEncoderParams(
    ch=16, ch_mult=(1, 2, 4, 6), num_res_blocks=1, z_channels=16, norm_groups=4, scale_factor=1.0, shift_factor=0.0
)
KL_WEIGHT = 1e-4
LOG_STEPS = 1
