"""Models that mflux saved: diffusers' and transformers' layouts with a few names and one axis order changed.

mflux writes `transformer/0.safetensors`, ... with MLX's quantized layers, groups of 64, and says
`quantization_level` and `mflux_version` in the headers.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

from flux.weights.headers import Entry, Header

# mflux's names -> diffusers' and transformers'; None for what is there twice.
NAMES: tuple[tuple[str, str | None], ...] = (
    (r"(transformer_blocks\.\d+\.ff(?:_context)?)\.linear1\.(\w+)", r"\1.net.0.proj.\2"),
    (r"(transformer_blocks\.\d+\.ff(?:_context)?)\.linear2\.(\w+)", r"\1.net.2.\2"),
    (
        r"t5_blocks\.0\.attention\.(SelfAttention\.relative_attention_bias\.\w+)",
        r"encoder.block.0.layer.0.\1",
    ),
    (r"t5_blocks\.(?!0\.)\d+\.attention\.SelfAttention\.relative_attention_bias\.\w+", None),
    (r"t5_blocks\.(\d+)\.attention\.(.+)", r"encoder.block.\1.layer.0.\2"),
    (r"t5_blocks\.(\d+)\.ff\.(.+)", r"encoder.block.\1.layer.1.\2"),
    (r"final_layer_norm\.weight", "encoder.final_layer_norm.weight"),
    (r"((?:en|de)coder\.conv_(?:in|out))\.conv2d\.(\w+)", r"\1.\2"),
    (r"((?:en|de)coder\.conv_norm_out)\.norm\.(\w+)", r"\1.\2"),
)
AXES = (0, 3, 1, 2)  # of a convolution: (O, H, W, I) -> (O, I, H, W)
SIGNS = re.compile(
    r"t5_blocks\.|transformer_blocks\.\d+\.ff(_context)?\.linear1\.|(en|de)coder\.conv_in\.conv2d\."
)


def is_mflux(theirs: Header) -> bool:
    """Whether mflux wrote a file: by its metadata or, where these were lost, by names that only it has."""
    return "mflux_version" in theirs.metadata or any(SIGNS.match(name) for name in theirs.tensors)


def header(theirs: Header) -> Header:
    """The header of a file that mflux wrote, with our names and shapes."""
    entries = {
        ours: Entry(entry.dtype, _permuted(entry.shape), entry.start)
        for name, entry in theirs.tensors.items()
        if (ours := _name(name))
    }
    return Header(entries, theirs.metadata)


def tensors(theirs: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of such a file in the same way. Lazy."""
    return {
        ours: tensor.transpose(AXES) if tensor.ndim == 4 else tensor
        for name, tensor in theirs.items()
        if (ours := _name(name))
    }


def _name(theirs: str) -> str | None:
    """mflux's name of a tensor -> diffusers' or transformers'; None where it repeats another."""
    for pattern, ours in NAMES:
        if match := re.fullmatch(pattern, theirs):
            return match.expand(ours) if ours else None
    return theirs


def _permuted(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in AXES) if len(shape) == 4 else shape
