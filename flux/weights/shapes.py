"""The networks' shapes, read off their tensors; a config says only what tensors do not show.

Every size is what most of the tensors that show it say, so that one that is misshapen or missing is named by
the check that follows instead of bending the whole network. Quantized weights are packed along their second
axis: sizes come from first axes, biases and norms.
"""

import math
import re
from collections.abc import Callable, Mapping
from itertools import count
from statistics import mode
from typing import Any

import mlx.core as mx

from flux import jsonfiles
from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoderParams
from flux.models.autoencoder_tiny import TinyDecoderParams
from flux.models.clip import CLIPTextParams
from flux.models.controlnet import ControlNetParams
from flux.models.redux import ReduxParams
from flux.models.siglip import SiglipParams
from flux.models.t5 import T5Params
from flux.models.transformer import FluxParams
from flux.weights.headers import MAX_BLOCKS, MAX_LEVELS, block_count

Tensors = Mapping[str, mx.array]
Params = (
    FluxParams
    | ControlNetParams
    | AutoEncoderParams
    | CLIPTextParams
    | T5Params
    | SiglipParams
    | ReduxParams
    | TinyDecoderParams
)

# What is taken from config.json (diffusers' and transformers' words): our name, and how it is checked.
FROM_CONFIG: dict[str, dict[str, tuple[str, Callable[[Any, str], Any]]]] = {
    "transformer": {"axes_dims_rope": ("axes_dim", jsonfiles.counts)},
    "controlnet": {"axes_dims_rope": ("axes_dim", jsonfiles.counts)},
    "ae": {
        "norm_num_groups": ("norm_groups", jsonfiles.count),
        "scaling_factor": ("scale_factor", jsonfiles.positive),
        "shift_factor": ("shift_factor", jsonfiles.number),
    },
    "clip": {
        "num_attention_heads": ("num_attention_heads", jsonfiles.count),
        "hidden_act": ("hidden_act", jsonfiles.text),
        "layer_norm_eps": ("layer_norm_eps", jsonfiles.positive),
    },
    "t5": {
        "relative_attention_max_distance": ("relative_attention_max_distance", jsonfiles.count),
        "layer_norm_epsilon": ("layer_norm_epsilon", jsonfiles.positive),
    },
    "siglip": {
        "image_size": ("image_size", jsonfiles.count),
        "num_attention_heads": ("num_attention_heads", jsonfiles.count),
        "hidden_act": ("hidden_act", jsonfiles.text),
        "layer_norm_eps": ("layer_norm_eps", jsonfiles.positive),
    },
    "redux": {},
    "tiny decoder": {
        "scaling_factor": ("scale_factor", jsonfiles.positive),
        "shift_factor": ("shift_factor", jsonfiles.number),
    },
}


def params(part: str, tensors: Tensors, config: Mapping[str, Any]) -> Params:
    """The shape of a part (a key of `FROM_CONFIG`) with these tensors (our names and axes).

    FluxError for a config whose values make no network.
    """
    known = {
        ours: checked(config[theirs], f"config: {theirs}")
        for theirs, (ours, checked) in FROM_CONFIG[part].items()
        if config.get(theirs) is not None
    }
    readers: dict[str, Callable[[Tensors, Mapping[str, Any]], Params]] = {
        "transformer": flux_params,
        "ae": autoencoder_params,
        "clip": clip_params,
        "t5": t5_params,
        "controlnet": controlnet_params,
        "siglip": siglip_params,
        "redux": redux_params,
        "tiny decoder": tiny_decoder_params,
    }
    return readers[part](tensors, known)


def _size(tensors: Tensors, default: int, *axes: tuple[str, int]) -> int:
    """The size that most of these tensors have at their axis, (name, axis); default where all are absent."""
    sizes = [
        tensors[name].shape[axis] for name, axis in axes if name in tensors and axis < tensors[name].ndim
    ]
    size = mode(sizes) if sizes else default
    if size == 0:
        raise FluxError(f"{', '.join(name for name, _ in axes if name in tensors)}: tensors without content")
    return size


def _optional(tensors: Tensors, name: str) -> int:
    """The first size of a tensor, 0 where it is absent."""
    return _size(tensors, 0, (name, 0)) if name in tensors else 0


def _divided(size: int, parts: int, what: str) -> int:
    """parts, where they divide a size evenly."""
    if size % parts:
        raise FluxError(f"{what} {parts} does not divide the width {size}")
    return parts


def _count(tensors: Tensors, prefix: str, most: int = MAX_BLOCKS) -> int:
    """How many modules `prefix.0`, `prefix.1`, ... there are."""
    numbers = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in tensors)
    return block_count([number[1] for number in numbers if number], prefix, most)


def flux_params(tensors: Tensors, known: Mapping[str, Any]) -> FluxParams:
    """The head size is the QK norms'; axes without a config are FLUX's 16 : 56 : 56 of it."""
    usual = FluxParams()
    block = "double_blocks.0"
    hidden = _size(
        tensors,
        usual.hidden_size,
        ("img_in.bias", 0),
        ("txt_in.bias", 0),
        ("time_in.out_layer.bias", 0),
        ("vector_in.out_layer.bias", 0),
        (f"{block}.img_attn.proj.bias", 0),
    )
    norms = [
        f"{block}.{stream}_attn.norm.{which}_norm.scale"
        for stream in ("img", "txt")
        for which in ("query", "key")
    ]
    norms += [f"single_blocks.0.norm.{which}_norm.scale" for which in ("query", "key")]
    head = _size(tensors, usual.hidden_size // usual.num_heads, *((name, 0) for name in norms))
    mlp = _size(tensors, 4 * hidden, (f"{block}.img_mlp.0.bias", 0), (f"{block}.txt_mlp.0.bias", 0))
    axes = tuple(known.get("axes_dim", (head // 8, head * 7 // 16, head * 7 // 16)))
    return FluxParams(
        in_channels=_size(tensors, usual.in_channels, ("img_in.weight", 1)),
        out_channels=_size(
            tensors, usual.out_channels, ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0)
        ),
        vec_in_dim=_size(tensors, usual.vec_in_dim, ("vector_in.in_layer.weight", 1)),
        context_in_dim=_size(tensors, usual.context_in_dim, ("txt_in.weight", 1)),
        hidden_size=hidden,
        mlp_ratio=mlp / hidden,
        num_heads=hidden // _divided(hidden, head, "the head size"),
        depth=_count(tensors, "double_blocks"),
        depth_single_blocks=_count(tensors, "single_blocks"),
        axes_dim=axes,
        qkv_bias=f"{block}.img_attn.qkv.bias" in tensors or f"{block}.txt_attn.qkv.bias" in tensors,
        guidance_embed=any(name.startswith("guidance_in.") for name in tensors),
    )


def controlnet_params(tensors: Tensors, known: Mapping[str, Any]) -> ControlNetParams:
    """A transformer's, with what the embedders of the control picture and of the mode say."""
    sizes = vars(flux_params(tensors, known))
    if not sizes["depth"] + sizes["depth_single_blocks"]:
        raise FluxError("a ControlNet needs at least one block")
    sizes["out_channels"] = sizes["in_channels"]
    return ControlNetParams(
        **sizes,
        control_channels=_size(tensors, sizes["in_channels"], ("pos_embed_input.weight", 1)),
        modes=_optional(tensors, "controlnet_mode_embedder.weight"),
        hint_channels=_optional(tensors, "input_hint_block.0.bias"),
    )


def autoencoder_params(tensors: Tensors, known: Mapping[str, Any]) -> AutoEncoderParams:
    """Group count, scale and shift are FLUX's without a config. Convolutions are (O, H, W, I) here."""
    usual = AutoEncoderParams()
    ch = _size(tensors, usual.ch, ("encoder.conv_in.bias", 0), ("decoder.norm_out.bias", 0))
    biases = [f"block.{j}.{conv}.bias" for j in (0, 1) for conv in ("conv1", "conv2")]
    widths = [
        _size(
            tensors,
            ch,
            *((f"{side}.{i}.{bias}", 0) for side in ("encoder.down", "decoder.up") for bias in biases),
        )
        for i in range(_count(tensors, "encoder.down", MAX_LEVELS) or len(usual.ch_mult))
    ]
    if any(width % ch for width in widths):
        raise FluxError(f"the autoencoder's widths {widths} are not multiples of the first, {ch}")
    if ch % (groups := known.get("norm_groups", usual.norm_groups)):
        why = "is wrong" if "norm_groups" in known else "is missing"
        raise FluxError(f"{ch} channels in {groups} norm groups: its config.json (norm_num_groups) {why}")
    return AutoEncoderParams(
        in_channels=_size(tensors, usual.in_channels, ("encoder.conv_in.weight", 3)),
        ch=ch,
        out_ch=_size(tensors, usual.out_ch, ("decoder.conv_out.bias", 0), ("decoder.conv_out.weight", 0)),
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=_count(tensors, "encoder.down.0.block", MAX_LEVELS) or usual.num_res_blocks,
        z_channels=_size(tensors, usual.z_channels, ("decoder.conv_in.weight", 3)),
        **known,
    )


def clip_params(tensors: Tensors, known: Mapping[str, Any]) -> CLIPTextParams:
    """Heads have size 64 without a config, as all of CLIP's have."""
    usual = CLIPTextParams()
    model = "text_model"
    layer = f"{model}.encoder.layers.0"
    hidden = _size(
        tensors,
        usual.hidden_size,
        (f"{model}.final_layer_norm.weight", 0),
        (f"{layer}.layer_norm1.weight", 0),
        (f"{layer}.mlp.fc2.bias", 0),
    )
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": _size(tensors, 4 * hidden, (f"{layer}.mlp.fc1.bias", 0)),
        "num_hidden_layers": _count(tensors, f"{model}.encoder.layers"),
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": _size(
            tensors, usual.max_position_embeddings, (f"{model}.embeddings.position_embedding.weight", 0)
        ),
        "vocab_size": _size(tensors, usual.vocab_size, (f"{model}.embeddings.token_embedding.weight", 0)),
    }
    sizes |= known
    _divided(hidden, sizes["num_attention_heads"], "num_attention_heads")
    return CLIPTextParams(**sizes)


def t5_params(tensors: Tensors, known: Mapping[str, Any]) -> T5Params:
    """All but the distance of the last bucket and the norms' epsilon can be read off."""
    usual = T5Params()
    attention, feed = "encoder.block.0.layer.0", "encoder.block.0.layer.1"
    bias = f"{attention}.SelfAttention.relative_attention_bias.weight"
    heads = _size(tensors, usual.num_heads, (bias, 1))
    buckets = _size(tensors, usual.relative_attention_num_buckets, (bias, 0))
    distance = known.get("relative_attention_max_distance", usual.relative_attention_max_distance)
    if not 1 <= buckets // 4 < distance:  # a quarter of them are for exact distances, the others grow
        raise FluxError(f"{buckets} buckets cannot hold relative attention to distances up to {distance}")
    inner = _size(tensors, 64 * heads, *((f"{attention}.SelfAttention.{name}.weight", 0) for name in "qkv"))
    return T5Params(
        vocab_size=_size(tensors, usual.vocab_size, ("shared.weight", 0)),
        d_model=_size(
            tensors,
            usual.d_model,
            ("encoder.final_layer_norm.weight", 0),
            (f"{attention}.layer_norm.weight", 0),
            (f"{feed}.layer_norm.weight", 0),
        ),
        d_kv=inner // _divided(inner, heads, "the number of heads"),
        d_ff=_size(tensors, usual.d_ff, *((f"{feed}.DenseReluDense.wi_{i}.weight", 0) for i in (0, 1))),
        num_layers=_count(tensors, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        **known,
    )


def siglip_params(tensors: Tensors, known: Mapping[str, Any]) -> SiglipParams:
    """The picture's size and the heads are so400m-patch14-384's without a config, where the rest is.

    Else patches cover a picture without rest, and heads have size 64.
    """
    usual = SiglipParams()
    layer, patch_embedding = "encoder.layers.0", "embeddings.patch_embedding"
    hidden = _size(
        tensors,
        usual.hidden_size,
        ("post_layernorm.weight", 0),
        (f"{patch_embedding}.bias", 0),
        (f"{layer}.layer_norm1.weight", 0),
        (f"{layer}.mlp.fc2.bias", 0),
    )
    patch = _size(tensors, usual.patch_size, *((f"{patch_embedding}.weight", axis) for axis in (1, 2)))
    patches = _size(tensors, usual.tokens, ("embeddings.position_embedding.weight", 0))
    heads = usual.num_attention_heads if hidden == usual.hidden_size else max(1, hidden // 64)
    is_usual = (patch, patches) == (usual.patch_size, usual.tokens)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": _size(tensors, usual.intermediate_size, (f"{layer}.mlp.fc1.bias", 0)),
        "num_hidden_layers": _count(tensors, "encoder.layers"),
        "num_attention_heads": heads,
        "image_size": usual.image_size if is_usual else math.isqrt(patches) * patch,
        "patch_size": patch,
    }
    sizes |= known
    _divided(hidden, sizes["num_attention_heads"], "num_attention_heads")
    return SiglipParams(**sizes)


def redux_params(tensors: Tensors, known: Mapping[str, Any]) -> ReduxParams:
    """Both widths, from the weights of the two layers."""
    usual = ReduxParams()
    return ReduxParams(
        redux_dim=_size(tensors, usual.redux_dim, ("redux_up.weight", 1)),
        txt_in_features=_size(
            tensors, usual.txt_in_features, ("redux_down.bias", 0), ("redux_down.weight", 0)
        ),
        **known,
    )


def tiny_decoder_params(tensors: Tensors, known: Mapping[str, Any]) -> TinyDecoderParams:
    """Blocks are what stands between layers that double the size, which have no weights but a number."""
    usual = TinyDecoderParams()
    _count(tensors, "layers")
    found = {int(number[1]) for name in tensors if (number := re.match(r"layers\.(\d+)\.conv\.", name))}
    starts = sorted(number for number in found if number - 1 not in found)
    lengths = [next(n for n in count(1) if start + n not in found) for start in starts]
    return TinyDecoderParams(
        latent_channels=_size(tensors, usual.latent_channels, ("layers.0.weight", 3)),
        width=_size(
            tensors, usual.width, ("layers.0.bias", 0), *((f"layers.{i}.conv.0.bias", 0) for i in found)
        ),
        blocks=tuple(lengths) or usual.blocks,
        **known,
    )
