"""The autoencoder against diffusers' AutoencoderKL: the same random weights, the same pictures."""

import re

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageOps

from flux.models.autoencoder import AutoEncoder, AutoEncoderParams

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 5e-5  # specs/numerics.md


def bfl_name(name: str, levels: int) -> str:
    """diffusers' name of a tensor -> BFL's."""
    table = [
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"group_norm", "norm"),
        (r"to_([qkv])\b", r"\1"),
        (r"to_out\.0", "proj_out"),
        (r"down_blocks\.", "down."),
        (r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}"),
        (r"resnets\.", "block."),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def pair(params: AutoEncoderParams) -> tuple[AutoEncoder, "diffusers.AutoencoderKL"]:
    """Our network and diffusers' with the same random weights, norms and biases included."""
    levels = len(params.ch_mult)
    reference = diffusers.AutoencoderKL(
        in_channels=params.in_channels,
        out_channels=params.out_ch,
        block_out_channels=[params.ch * mult for mult in params.ch_mult],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=params.num_res_blocks,
        latent_channels=params.z_channels,
        norm_num_groups=params.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            if tensor.ndim == 1:
                tensor.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3, generator=generator)
    ours = AutoEncoder(params)
    ours.load_weights([(bfl_name(k, levels), weight(k, v)) for k, v in reference.state_dict().items()])
    return ours, reference


def weight(name: str, tensor: "torch.Tensor") -> mx.array:
    array = tensor.detach().numpy()
    return mx.array(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def relative_error(ours: mx.array, reference: "torch.Tensor") -> float:
    """||ours - reference|| / ||reference||, channels-last against channels-first, in float64."""
    reference = reference.double().numpy().transpose(0, 2, 3, 1)
    return float(np.linalg.norm(np.array(ours) - reference) / np.linalg.norm(reference))


TINY = AutoEncoderParams(ch=16, ch_mult=(1, 2, 4, 4), z_channels=4, norm_groups=8)
SHALLOW = AutoEncoderParams(ch=8, ch_mult=(1, 3), num_res_blocks=1, z_channels=6, norm_groups=4)


@pytest.mark.parametrize("params", [TINY, SHALLOW], ids=["tiny", "shallow"])
@pytest.mark.parametrize("size", [(1, 64, 64), (2, 32, 56), (1, 104, 24)])
def test_encode_and_decode_equal_diffusers(params, size):
    ours, reference = pair(params)
    check(ours, reference, np.random.default_rng(0).uniform(-1, 1, (*size, 3)).astype(np.float32))


def test_full_size_network_equals_diffusers_on_a_photo(shared):
    ours, reference = pair(AutoEncoderParams())
    photo = Image.open(shared / "data" / "dog6" / "00.jpg").convert("RGB")
    for size in [(256, 256), (96, 64)]:
        pixels = np.asarray(ImageOps.fit(photo, size), np.float32)[None] / 127.5 - 1  # (1, H, W, 3)
        check(ours, reference, pixels)


@torch.no_grad()
def check(ours: AutoEncoder, reference: "diffusers.AutoencoderKL", x: np.ndarray) -> None:
    """Moments of x (B, H, W, 3), and the picture of a random latent of its size."""
    expected = reference.encode(torch.from_numpy(x.transpose(0, 3, 1, 2))).latent_dist
    mean, logvar = ours.moments(mx.array(x))
    assert relative_error(mean, expected.mean) <= TOLERANCE
    assert relative_error(logvar, expected.logvar) <= TOLERANCE

    params = ours.params
    z = np.random.default_rng(1).standard_normal(mean.shape).astype(np.float32)
    unscaled = torch.from_numpy(z.transpose(0, 3, 1, 2)) / params.scale_factor + params.shift_factor
    assert relative_error(ours.decode(mx.array(z)), reference.decode(unscaled).sample) <= TOLERANCE
