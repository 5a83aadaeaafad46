"""The networks of a training: built from the config, and which of their parts move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from flux.models.autoencoder import AutoEncoder
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.tokenizers import CLIPTokenizer, T5Tokenizer, read_spiece, read_unigram_json
from flux.training.pretrain.adversary import Discriminator
from flux.training.pretrain.config import COMPONENTS, GROUPS, Config
from flux.training.pretrain.spade import SpadeDecoder

ATTRIBUTES = {
    "vae": ("ae.",),
    "discriminator": ("discriminator.",),
    "flow": ("flow.",),
    "text_encoder": ("clip.", "t5."),
}
# Bytes below which the autoencoder does not go in pieces, which `mx.compile` would not take.
WHOLE = 2**62
WHOLE_ATTENTION = 2**32  # what its slices can index: 16 pictures of 700x700


class Networks(nn.Module):
    """All networks that a config's steps need: `ae`, and by need `discriminator`, `flow`, `clip`, `t5`."""

    def __init__(self, config: Config, tokenizers: "Tokenizers | None"):
        super().__init__()
        model, steps = config.model, config.steps
        self.ae = AutoEncoder(model.autoencoder)
        if any(step.train_spade for step in steps):
            self.ae.decoder = SpadeDecoder(model.autoencoder)
        for half in (self.ae.encoder, self.ae.decoder):
            half.mid.attn_1.scores_memory = WHOLE_ATTENTION
        if any(step.gan_training for step in steps):
            self.discriminator = Discriminator(model.discriminator)
        if tokenizers is not None:
            packed = 4 * model.autoencoder.z_channels
            self.flow = Flux(
                replace(
                    model.transformer,
                    in_channels=packed,
                    out_channels=packed,
                    vec_in_dim=model.clip.hidden_size,
                    context_in_dim=model.t5.d_model,
                )
            )
            self.clip = CLIPTextModel(replace(model.clip, vocab_size=tokenizers.clip_size))
            self.t5 = T5Encoder(replace(model.t5, vocab_size=tokenizers.t5_size))

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the networks compute in: that of their weights."""
        return self.ae.encoder.conv_in.weight.dtype

    def component(self, name: str) -> nn.Module | None:
        """The module of a component's name; None where no step needs it."""
        if name in ("encoder", "decoder"):
            return self.ae[name]
        if name == "spade":
            return self.ae.decoder.get("spade")
        return self.get(name)

    def train_only(self, trained: frozenset[str]) -> None:
        """Freezes everything but these components, whatever was frozen before."""
        for name in COMPONENTS:  # `spade` comes after the decoder that it is a part of
            module = self.component(name)
            if module is not None:
                (module.unfreeze if name in trained else module.freeze)()


def group_of(parameter: str) -> str:
    """The group, hence the optimizer, of a parameter's name in `Networks`."""
    return next(group for group in GROUPS if parameter.startswith(ATTRIBUTES[group]))


@contextmanager
def mapped(module: nn.Module, function: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Within the block the module computes with function(parameter) instead of each parameter.

    In a loss this gives a network that lets gradients through but takes none (`mx.stop_gradient`), or one
    that computes in another type and takes its gradients in its type.
    """
    before = module.parameters()
    module.update(tree_map(function, before))
    try:
        yield
    finally:
        module.update(before)


class Tokenizers:
    """Both vocabularies, from their folders."""

    def __init__(self, clip_folder: Path, t5_folder: Path, t5_length: int):
        self.folders = (clip_folder, t5_folder)
        self.clip = CLIPTokenizer.from_folder(clip_folder)
        self.t5 = T5Tokenizer.from_folder(t5_folder, t5_length)
        self.clip_size = self.clip.eos_token_id + 1  # the end token is the last, in CLIP's and ours
        spiece = t5_folder / "spiece.model"
        read = read_spiece if spiece.is_file() else read_unigram_json
        self.t5_size = len(read(spiece if spiece.is_file() else t5_folder / "tokenizer.json").pieces)
