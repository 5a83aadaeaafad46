"""Write a whole model as a folder: in diffusers' layout, which diffusers loads too, or in BFL's.

A folder appears whole or not at all: it is written under another name beside it and then renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.models.clip import CLIPTextModel, CLIPTextParams
from flux.models.t5 import T5Encoder, T5Params
from flux.models.transformer import Flux, FluxParams
from flux.sampler import DEV_SHIFT, Shift
from flux.tokenizers import CLIPTokenizer, clip_vocabulary, read_gzip, read_merges
from flux.weights import keymaps, quantize, registry, tensors
from flux.weights.layouts import FOLDERS
from flux.weights.registry import ModelSpec
from flux.weights.specs import DEFAULTS

DIFFUSERS_VERSION = "0.32.0"  # of the format; diffusers reads the files of older versions
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "ae": "diffusion_pytorch_model",
    "clip": "model",
    "t5": "model",
}


@dataclass(frozen=True)
class Model:
    """What a folder holds: four networks, the folders of two tokenizers, and the model's defaults."""

    flux: Flux
    ae: AutoEncoder
    clip: CLIPTextModel
    t5: T5Encoder
    clip_tokenizer: Path  # with vocab.json and merges.txt
    t5_tokenizer: Path  # with spiece.model
    spec: ModelSpec

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names of their parts."""
        return {"transformer": self.flux, "ae": self.ae, "clip": self.clip, "t5": self.t5}


def save_diffusers(folder: str | os.PathLike, model: Model, dtype: mx.Dtype | None = mx.float16) -> None:
    """Writes a model in diffusers' layout; an older model of that name is replaced.

    dtype: the weights' type in the files; None keeps each as it is. FluxError for what diffusers
    cannot hold (quantized layers, an MLP ratio other than 4) and for a folder that cannot be written.
    """
    for network in model.networks.values():
        if quantize.metadata_of(network):
            raise FluxError("diffusers' layout cannot hold MLX's quantized layers: use save_bfl")
    configs = _configs(model)
    with _replacing(Path(folder)) as new:
        for kind, network in model.networks.items():
            _write_json(new / FOLDERS[kind] / "config.json", configs[kind])
            file = new / FOLDERS[kind] / f"{STEMS[kind]}.safetensors"
            tensors.save(file, _weights(kind, network, dtype, diffusers=True))
        _write_json(new / "scheduler" / "scheduler_config.json", scheduler_config(model.spec))
        name = registry.PIPELINES[model.spec.input]
        _write_json(new / "model_index.json", {"_class_name": name, **MODEL_INDEX})
        _write_rest(new, model)


def save_bfl(folder: str | os.PathLike, model: Model, dtype: mx.Dtype | None = None) -> None:
    """Writes a model in BFL's layout, quantized layers too; an older model of that name is replaced.

    What tensors do not show of a network (norm groups, axes, ...) goes into the files' headers.
    """
    configs = _configs(model)
    files = {
        "transformer": f"flux1-{model.spec.name}.safetensors",
        "ae": "ae.safetensors",
        "clip": "text_encoder/model.safetensors",
        "t5": "text_encoder_2/model.safetensors",
    }
    with _replacing(Path(folder)) as new:
        for kind, network in model.networks.items():
            save_network(new / files[kind], kind, network, configs[kind], dtype)
        for kind in ("clip", "t5"):
            _write_json(new / FOLDERS[kind] / "config.json", configs[kind])
        _write_rest(new, model)


def save_network(
    path: Path, kind: str, network: nn.Module, config: Mapping[str, Any], dtype: mx.Dtype | None = None
) -> None:
    """Writes one network, quantized or not, as a single file that `checkpoints.load_part` reads by itself.

    kind: "transformer", "ae", "clip" or "t5". config: kept in the header.
    """
    metadata = {"config": json.dumps(config), **quantize.metadata_of(network)}
    weights = _weights(kind, network, dtype, diffusers=False)
    for tensor in weights.values():  # one by one: all at once would have the wide weights in memory together
        mx.eval(tensor)
    tensors.save(path, weights, metadata)


def _weights(kind: str, network: nn.Module, dtype: mx.Dtype | None, diffusers: bool) -> dict[str, mx.array]:
    weights = dict(tree_flatten(network.parameters()))
    if dtype is not None:
        weights = {
            n: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for n, w in weights.items()
        }
    return keymaps.to_file(kind, weights, diffusers)


def _write_rest(new: Path, model: Model) -> None:
    clip_length = model.clip.params.max_position_embeddings
    lengths = {"tokenizer": clip_length, "tokenizer_2": model.spec.t5_length}
    for name, source in (("tokenizer", model.clip_tokenizer), ("tokenizer_2", model.t5_tokenizer)):
        (new / name).mkdir()
        for file in Path(source).iterdir():
            if file.name == "merges.txt.gz":  # this package's form of CLIP's vocabulary
                _write_clip_vocabulary(new / name, read_gzip(file))
            elif file.is_file():
                shutil.copyfile(file, new / name / file.name)
        config = new / name / "tokenizer_config.json"
        if not config.exists():  # without it transformers' tokenizers do not know the length to pad to
            _write_json(config, {"tokenizer_class": MODEL_INDEX[name][1], "model_max_length": lengths[name]})
    defaults = {k: v for k, v in asdict(model.spec).items() if k not in ("repo", "file")}
    _write_json(new / DEFAULTS, defaults)


def _write_clip_vocabulary(folder: Path, merges: str) -> None:
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    _write_json(folder / "vocab.json", clip_vocabulary(read_merges(merges)))


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that replaces `folder` when the block ends well, and vanishes otherwise.

    Only a model that this program wrote gives way to another.
    """
    if folder.exists() and not (folder / DEFAULTS).is_file():
        raise FluxError(f"{folder}: exists and is not a model that this program wrote: choose another name")
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    except OSError as error:
        raise FluxError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- Configs, in diffusers' and transformers' words ---

MODEL_INDEX = {
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _configs(model: Model) -> dict[str, dict[str, Any]]:
    tokenizer = CLIPTokenizer.from_folder(model.clip_tokenizer)
    return {
        "transformer": transformer_config(model.flux.params),
        "ae": autoencoder_config(model.ae.params),
        "clip": clip_config(model.clip.params, tokenizer.bos_token_id, tokenizer.eos_token_id),
        "t5": t5_config(model.t5.params),
    }


def transformer_config(params: FluxParams) -> dict[str, Any]:
    """diffusers' config.json of a transformer. FluxError for a network that its class cannot hold."""
    if params.mlp_ratio != 4 or not params.qkv_bias or params.theta != 10000:
        raise FluxError("diffusers' FluxTransformer2DModel has mlp_ratio 4, qkv_bias and theta 10000 only")
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "patch_size": 1,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "axes_dims_rope": list(params.axes_dim),
    }


def autoencoder_config(params: AutoEncoderParams) -> dict[str, Any]:
    """diffusers' config.json of an autoencoder."""
    levels = len(params.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": [params.ch * mult for mult in params.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": params.in_channels,
        "out_channels": params.out_ch,
        "latent_channels": params.z_channels,
        "layers_per_block": params.num_res_blocks,
        "norm_num_groups": params.norm_groups,
        "scaling_factor": params.scale_factor,
        "shift_factor": params.shift_factor,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def clip_config(params: CLIPTextParams, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """transformers' config.json of a CLIP text encoder."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **asdict(params),
        "projection_dim": params.hidden_size,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": 1,
    }


def t5_config(params: T5Params) -> dict[str, Any]:
    """transformers' config.json of a T5 encoder."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **asdict(params),
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """diffusers' scheduler_config.json for a model's time shift."""
    shift = DEV_SHIFT if spec.shift is True else spec.shift
    points = shift if isinstance(shift, Shift) else DEV_SHIFT
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "shift": 3.0 if isinstance(shift, Shift) else float(shift or 1.0),
        "use_dynamic_shifting": isinstance(shift, Shift),
        "base_shift": points.base,
        "max_shift": points.most,
        "base_image_seq_len": points.base_tokens,
        "max_image_seq_len": points.most_tokens,
    }
