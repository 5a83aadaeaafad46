"""A ControlNet of FLUX.1: copies of the transformer's first blocks, which see a control picture as well.

What they compute is added to the transformer's own activations (Zhang et al. 2023). Two kinds: InstantX's,
Shakker-Labs' and jasperai's take the control picture's latent, XLabs' takes its pixels. Attribute names are
those of BFL's layout, as in XLabs' files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux.models.layers import silu
from flux.models.transformer import Backbone, FluxParams, ModulationVectors, Residuals

HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)  # of the convolutions over pixels, which leave an eighth of the size


@dataclass(frozen=True)
class ControlNetParams(FluxParams):
    """The shape of a ControlNet; the defaults are those of InstantX's union for FLUX.1-dev, without modes.

    control_channels: of a token of the control picture. modes: how many kinds of control picture a union
    tells apart; 0 where it is not told. hint_channels: of the convolutions over pixels; 0 where the control
    picture's latent is taken.
    """

    depth: int = 5
    depth_single_blocks: int = 10
    control_channels: int = 64
    modes: int = 0
    hint_channels: int = 0


class ControlNet(Backbone):
    """The embedders and blocks of a transformer without its final layer, and a layer after each block.

    As of `Flux`, what does not depend on the noisy latent is computed once a picture: `embed_text`,
    `positions`, `modulation` and, here, `embed_control`.
    """

    params: ControlNetParams

    def __init__(self, params: ControlNetParams):
        super().__init__(params)
        size = params.hidden_size
        self.pos_embed_input = nn.Linear(params.control_channels, size)
        self.controlnet_blocks = [nn.Linear(size, size) for _ in range(params.depth)]
        self.controlnet_single_blocks = [nn.Linear(size, size) for _ in range(params.depth_single_blocks)]
        if params.modes:
            self.controlnet_mode_embedder = nn.Embedding(params.modes, size)
        if params.hint_channels:
            self.input_hint_block = hint_block(params.hint_channels)

    def __call__(
        self,
        img: mx.array,
        img_ids: mx.array,
        txt: mx.array,
        txt_ids: mx.array,
        timesteps: mx.array,
        y: mx.array,
        guidance: mx.array | None = None,
        *,
        control: mx.array,
        mode: int | None = None,
    ) -> Residuals:
        """The residuals of one step: `residuals` with all that it needs.

        control (B, Li, control_channels), the packed latent or hint; mode: for a union, from 0. The other
        arguments are those of `Flux`; txt_ids are the text's, without the mode's.
        """
        vectors = self._vectors(self._silu_vec(timesteps, y, guidance))
        if mode is not None:
            txt_ids = mx.concatenate([txt_ids[:, :1], txt_ids], axis=1)
        pe = self.positions(txt_ids, img_ids)
        return self.residuals(img, self.embed_control(control), self.embed_text(txt, mode), pe, vectors)

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes the control picture's pixels, by `hint`, and not its latent."""
        return self.params.hint_channels > 0

    @property
    def repeats(self) -> bool:
        """Whether its double blocks' residuals are repeated, see `spread`: XLabs', which take pixels."""
        return self.takes_pixels

    # Once a picture.

    def embed_text(self, txt: mx.array, mode: int | None = None) -> mx.array:
        """T5's features (B, Lt, context_in_dim) -> (B, Lt, hidden_size), with a mode (B, 1+Lt, hidden_size).

        The mode is one more token of text, the first, and has the position that all text has.
        """
        text = super().embed_text(txt)
        if mode is None:
            return text
        token = self.controlnet_mode_embedder(mx.array([[mode]]))  # (1, 1, C)
        token = mx.broadcast_to(token, (len(text), *token.shape[1:]))
        return mx.concatenate([token.astype(text.dtype), text], axis=1)

    def hint(self, pixels: mx.array) -> mx.array:
        """Pixels (B, H, W, 3) in -1..1 -> (B, H/8, W/8, hint_channels), which is packed as a latent is."""
        first, *others = self.input_hint_block
        x = first(pixels.astype(self.dtype))
        for layer in others[1::2]:
            x = layer(silu(x))
        return x

    def embed_control(self, control: mx.array) -> mx.array:
        """A control picture's packed latent or hint (B, L, control_channels) -> (B, L, hidden_size)."""
        return self.pos_embed_input(control.astype(self.dtype))

    # Once a step.

    def residuals(
        self, img: mx.array, control: mx.array, txt: mx.array, pe: mx.array, vectors: ModulationVectors
    ) -> Residuals:
        """What each block adds, (B, Li, hidden_size), for the noisy latent img (B, Li, in_channels).

        control, txt, pe and vectors come from `embed_control`, `embed_text`, `positions` and `modulation`.
        """
        img = self.img_in(img.astype(self.dtype)) + control
        double, single = [], []
        for block, out, (txt_mod, img_mod) in zip(
            self.double_blocks, self.controlnet_blocks, vectors.double, strict=True
        ):
            txt, img = block(txt, img, pe, txt_mod, img_mod)
            double.append(out(img))
        x = mx.concatenate([txt, img], axis=1)  # (B, Lt+Li, C)
        for single_block, out, mod in zip(
            self.single_blocks, self.controlnet_single_blocks, vectors.single, strict=True
        ):
            x = single_block(x, pe, mod)
            single.append(out(x[:, txt.shape[1] :]))
        return Residuals(double, single)


def hint_block(channels: int) -> list[nn.Module]:
    """The convolutions over pixels. The SiLUs between them only keep the file's numbering."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(HINT_STRIDES):
        layers += [nn.SiLU()] if i else []
        layers += [nn.Conv2d(channels if i else 3, channels, 3, stride, padding=1)]
    return layers


def spread(residuals: Sequence[mx.array], blocks: int, repeat: bool) -> list[mx.array]:
    """A ControlNet's residuals -> one for each of a transformer's blocks; [] of none.

    repeat: one after another and then from the first again, as XLabs' double blocks are trained. Otherwise
    each serves ceil(blocks / residuals) blocks in a row, as in InstantX's and diffusers' code; the last ones
    may then have no block: the sixth of Union-Pro-2.0 has none in FLUX.1.
    """
    if not residuals:
        return []
    in_a_row = math.ceil(blocks / len(residuals))
    return [residuals[i % len(residuals) if repeat else i // in_a_row] for i in range(blocks)]
