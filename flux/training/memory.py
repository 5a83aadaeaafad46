"""What a step of LoRA training will take in memory, before anything is loaded."""

from dataclasses import dataclass
from functools import cache

import mlx.nn as nn

from flux.adapters.beside import linear_shape
from flux.adapters.lora import linears
from flux.adapters.training import DEFAULT_TARGET, targets
from flux.models.transformer import Flux, FluxParams
from flux.training.gradient_checkpointing import SCORES
from flux.trees import named_arrays
from flux.weights.quantize import QUANTIZED, group_size_of

PIXELS_PER_TOKEN = 16  # along each side: 8 of the autoencoder, 2 of a token's patch
ADAPTER_COPIES = 2  # the weights and their gradient; an optimizer keeps so many more:
OPTIMIZER_COPIES = {"adam": 2.0, "adamw": 2.0, "adafactor": 0.0, "lion": 1.0, "prodigy": 3.3}


@dataclass(frozen=True)
class Estimate:
    """Bytes of the transformer's weights, of the adapter with its gradient and optimizer, of activations."""

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of them, in bytes."""
        return self.weights + self.adapter + self.activations


def estimate(
    params: FluxParams,
    bits: int | None,
    image_size: tuple[int, int],
    batch: int = 1,
    rank: int = 16,
    checkpoint: bool = False,
    optimizer: str = "adamw",
    *,
    mode: str = "affine",
    which: str = DEFAULT_TARGET,
    last_blocks: int | None = None,
    text_tokens: int = 512,
    element_size: int = 2,
) -> Estimate:
    """The memory of one step on pictures of image_size (height, width) in pixels.

    bits: None for weights that are not quantized. mode: as in `weights.quantize.quantize`.
    which, last_blocks: as in `adapters.targets`. element_size: bytes of an activation and of a weight that is
    not quantized.
    """
    flow = Flux(params)  # never evaluated: its shapes alone
    weights = weight_bytes(params, bits, mode, element_size)
    layers = linears(flow)
    changed = [linear_shape(layers[name]) for name in targets(flow, which, last_blocks)]
    adapter = rank * sum(rows + columns for rows, columns in changed)
    copies = ADAPTER_COPIES + OPTIMIZER_COPIES[optimizer]
    height, width = image_size
    tokens = text_tokens + (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
    return Estimate(
        weights,
        int(4 * adapter * copies),
        activation_bytes(params, batch, tokens, checkpoint, element_size),
    )


@cache
def weight_bytes(params: FluxParams, bits: int | None, mode: str = "affine", element_size: int = 2) -> int:
    """The transformer's weights, quantized as `weights.quantize.quantize` does it with its group size."""
    flow, total = Flux(params), 0.0
    groups = {
        f"{name}.weight": group_size_of(layer.weight.shape[1], mode)
        for name, layer in flow.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(QUANTIZED)
    }
    scale = 8 if mode == "mxfp4" else 2 * 8 * element_size  # bits that a group has beside its weights
    for name, array in named_arrays(flow.parameters()):
        group = groups.get(name)
        if bits is not None and group is not None:
            total += array.size * (bits + scale / group) / 8
        else:
            total += array.size * element_size
    return int(total)


def activation_bytes(
    params: FluxParams, batch: int, tokens: int, checkpoint: bool, element_size: int = 2
) -> int:
    """What a step holds for its gradient at the worst moment; `tokens` of text and picture for each sample.

    The numbers are bytes for each token and unit of width, fitted to what `benchmarks.training` measures on a
    CPU: a part of them is float32 in any type. Kernels that fuse several operations need less.
    """
    width, blocks = batch * tokens * params.hidden_size, params.depth + params.depth_single_blocks
    scores = batch * params.num_heads * tokens * tokens * element_size  # of one block's attention
    if not checkpoint:
        kept = width * (21 + 11.5 * element_size) + scores
        return int(blocks * kept + width * (39 + 16.5 * element_size))
    inside: float = width * (90 + 10 * element_size)  # of the block whose gradient is made
    if scores > SCORES:  # some heads at a time
        inside += 4 * max(SCORES, scores // params.num_heads)
    else:
        inside += 1.5 * scores
    return int(blocks * width * element_size + inside)
