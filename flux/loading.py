"""A model's files -> its networks, with adapters, quantized, split: in which order, stands here alone."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from flux.adapters import Weighted, attach, evaluate
from flux.distributed.ranks import Ranks
from flux.distributed.sharding import shard
from flux.models.autoencoder import AutoEncoder
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.weights import checkpoints
from flux.weights.fit import check_fit, fit_adapted
from flux.weights.quantize import quantize
from flux.weights.registry import ModelSpec


class Parts(NamedTuple):
    """The networks and tokenizers of a model, and its row in the registry."""

    spec: ModelSpec
    flow: Flux
    ae: AutoEncoder
    clip: CLIPTextModel
    t5: T5Encoder
    clip_tokenizer: CLIPTokenizer
    t5_tokenizer: T5Tokenizer


def load(
    checkpoint: checkpoints.Checkpoint,
    dtype: mx.Dtype | None,
    bits: int | None,
    adapters: Sequence[Weighted],
    fuse_adapters: bool,
    mode: str = "affine",
    ranks: Ranks | None = None,
) -> Parts:
    """Load all parts, lazily. The order of what changes a model stands here, and here alone:

    load -> (fuse adapters) -> quantize (mode: see `flux.weights.quantize`) -> (put adapters beside) -> shard.
    """
    flow, clip, t5 = checkpoint.load_flux(dtype), checkpoint.load_clip(dtype), checkpoint.load_t5(dtype)
    ae = checkpoint.load_ae(dtype)
    tokenizers = (checkpoint.load_clip_tokenizer(), checkpoint.load_t5_tokenizer())
    check_fit(checkpoint.parts, flow, ae, clip, t5, tokenizers)
    networks = {"flux": flow, "clip": clip, "t5": t5}
    fused = attach(networks, adapters) if fuse_adapters else {}
    for attached in fused.values():
        attached.fuse()
    if bits is not None:
        quantize(flow, bits, mode=mode)
        quantize(t5, bits, mode=mode)
    if not fuse_adapters:
        attach(networks, adapters)
    if ranks is not None:
        shard(flow, ranks)
        shard(t5, ranks)
    for part in fused:
        evaluate(networks[part])
    label, names = checkpoint.parts["transformer"].label, [each.file for each in adapters]
    spec = fit_adapted(checkpoint.spec, flow.params, label, names)
    return Parts(spec, flow, ae, clip, t5, *tokenizers)
