"""The shape of the built-in model and the numbers of its training: the recipe's one page of constants.

To make the model, each line by two processes (`mlx.launch -n 2 --backend ring -- python -m ...`) or by one:

    python -m flux.training.pretrain.autoencoder --run DIR --steps 1500 --batch 8
    python -m flux.training.pretrain.latents --run DIR
    python -m flux.training.pretrain.flow --run DIR --steps 1780 --batch 48
    python -m flux.training.pretrain.export --run DIR --output flux/assets/tiny
    python -m flux.training.pretrain.evaluate

The committed weights were made so on two CPU cores (Intel Xeon, 2.6 GHz) that other work shared, so that
each process had 35 to 90 % of one: the autoencoder in 41 minutes, the latents in 4, the flow in 57. What
differed: the first 269 steps of the autoencoder were one process's, of 12 whole pictures of all subjects; its
SiLU was a faster one of the same values; and `--steps` was set anew, as the speed became known, at steps 269
and 540 of the autoencoder and 285, 814, 1120 and 1250 of the flow.
"""

from flux.models.autoencoder import AutoEncoderParams
from flux.models.clip import CLIPTextParams
from flux.models.t5 import T5Params
from flux.models.transformer import FluxParams

AUTOENCODER = AutoEncoderParams(
    ch=16,
    ch_mult=(1, 2, 4, 6),
    num_res_blocks=1,
    z_channels=16,
    norm_groups=4,
    scale_factor=1.0,
    shift_factor=0.0,
)
SUBJECTS = 205  # the first so many of the table are trained on; the rest are for fine-tuning
KL_WEIGHT = 1e-4
LOG_STEPS = 50

WIDTH = 128  # of both text encoders
CLIP_MERGES = 800  # enough for every word of the captions to be one token
T5_VOCABULARY = 320
T5_LENGTH = 20  # the longest caption has 17 tokens


def clip_params(vocab_size: int) -> CLIPTextParams:
    return CLIPTextParams(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=vocab_size,
    )


def t5_params(vocab_size: int) -> T5Params:
    return T5Params(vocab_size=vocab_size, d_model=WIDTH, d_kv=64, d_ff=2 * WIDTH, num_layers=2, num_heads=2)


FLUX = FluxParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=WIDTH,
    context_in_dim=WIDTH,
    hidden_size=192,
    num_heads=3,
    depth=1,
    depth_single_blocks=4,
    axes_dim=(8, 28, 28),
    guidance_embed=True,
)
CAPTION_DROPOUT = 0.1
TIME_SHIFT = 1.0
EMA_DECAY = 0.99
PAIRS = 3000  # pictures of two subjects among the latents
CROPS_UNTIL = 0.6  # of the autoencoder's steps
