"""Will the training fit into the machine's memory? An estimate before anything is loaded, with advice."""

import os
from dataclasses import replace
from typing import Any

import mlx.core as mx

from flux.models.transformer import FluxParams
from flux.training.finetune.options import QUANTIZE, Options
from flux.training.memory import Estimate, estimate

USABLE = 0.9  # of the memory: the rest is for the system


def machine_memory() -> int:
    """Bytes that MLX may fill: the GPU's recommended working set, or else the machine's memory."""
    found = mx.device_info().get("max_recommended_working_set_size")
    return int(found or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def needed(options: Options, params: FluxParams, shape: dict[str, Any]) -> Estimate:
    """shape: image_size, batch, text_tokens and element_size, as `memory.estimate` takes them."""
    bits, mode = QUANTIZE.get(options.quantize, (None, "affine"))
    return estimate(
        params,
        bits,
        rank=options.rank,
        checkpoint=options.grad_checkpoint,
        optimizer=options.optimizer,
        mode=mode,
        which=options.targets,
        last_blocks=options.last_blocks,
        **shape,
    )


def describe(options: Options, params: FluxParams, shape: dict[str, Any], memory: int) -> tuple[str, str]:
    """What a step takes, in a line; and where that is more than `memory` bytes, what would help, else ""."""
    need = needed(options, params, shape)
    parts = {"weights": need.weights, "adapter": need.adapter, "activations": need.activations}
    text = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"memory: about {need.total / 1e9:.2f} GB ({text}), {memory / 1e9:.1f} GB here"
    return line, "" if need.total <= USABLE * memory else _advice(options, params, shape, memory)


def _advice(options: Options, params: FluxParams, shape: dict[str, Any], memory: int) -> str:
    height, width = shape["image_size"]
    half = f"{max(16, height // 32 * 16)}x{max(16, width // 32 * 16)}"
    steps = [
        ("--grad-checkpoint", {"grad_checkpoint": True}, {}),
        ("--quantize 4", {"quantize": "4"}, {}),
        ("--batch-size 1", {}, {"batch": 1}),
        (f"--resolution {half}", {}, {"image_size": tuple(int(side) for side in half.split("x"))}),
        ("--lora-rank 4", {"rank": min(4, options.rank)}, {}),
    ]
    taken = []
    total = needed(options, params, shape).total
    for name, own, other in steps:
        changed = replace(options, **own), shape | other
        if (now := needed(changed[0], params, changed[1]).total) < total:
            (options, shape), total = changed, now
            taken.append(name)
        if total <= USABLE * memory:
            return f"this will not fit; with {' '.join(taken)} about {total / 1e9:.2f} GB would do"
    return f"this will not fit, and even {' '.join(taken)} needs about {total / 1e9:.2f} GB"
