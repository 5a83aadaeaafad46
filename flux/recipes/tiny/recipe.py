"""The shape of the built-in model and the numbers of its training: the recipe's one page of constants.

To make the model, each line by two processes (`mlx.launch -n 2 --backend ring -- python -m ...`) or by one:

    python -m flux.recipes.tiny.autoencoder --run DIR --steps 1500 --batch 8
    python -m flux.recipes.tiny.latents --run DIR
    python -m flux.recipes.tiny.flow --run DIR --steps 2400 --batch 96
    python -m flux.recipes.tiny.export --run DIR --output flux/assets/tiny
    python -m flux.recipes.tiny.evaluate

`--batch` is of each process. The committed weights were made by two of them on two CPU cores (Intel Xeon, AMD
EPYC) that other work shared, in parts. The autoencoder: first of 48 subjects, by the first line, in 41
minutes; then of all, by `--init tiny --steps 700 --batch 8 --rate 0.01`, in 16. The latents: 6 minutes. The
flow: 138 minutes, 528 thousand pictures. Its `--steps` were first 1700, from step 1160 on 1450, then 2400,
then 2750: each time the rate had come down to zero it began again, at a part of its peak. TIME_SHIFT was 1 up
to step 2400; then 18 % of the green and pink backgrounds had the other's colour.
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
    """The shape of the CLIP text encoder."""
    return CLIPTextParams(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=vocab_size,
    )


def t5_params(vocab_size: int) -> T5Params:
    """The shape of the T5 encoder."""
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
TIME_SHIFT = 3.0  # most of a picture is decided near t = 1, where unshifted times hardly come
EMA_DECAY = 0.99
PAIRS = 3000  # pictures of two subjects among the latents
CROPS_UNTIL = 0.6  # of the autoencoder's steps
SCENES = 60_000  # of the data set that the next model is trained on: scenes.py
