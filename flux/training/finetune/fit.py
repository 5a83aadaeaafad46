"""Will the training fit into the machine's memory? An estimate before anything is loaded, with advice."""

from dataclasses import replace
from typing import Any

from flux.errors import FluxError
from flux.models.transformer import FluxParams
from flux.training.finetune.options import Options
from flux.training.memory import Estimate, estimate

USABLE = 0.9  # of the memory: the rest is for the system


def needed(options: Options, params: FluxParams, shape: dict[str, Any], ranks: int = 1) -> Estimate:
    """shape: image_size, batch, text_tokens and element_size, as `memory.estimate` takes them.

    ranks: that share the base's weights.
    """
    bits, mode = options.quantization
    need = estimate(
        params,
        bits,
        rank=options.rank,
        checkpoint=options.grad_checkpoint or options.shard_base,
        optimizer=options.optimizer,
        mode=mode,
        which=options.targets,
        last_blocks=options.last_blocks,
        **shape,
    )
    return replace(need, weights=need.weights // ranks)


def describe(
    options: Options, params: FluxParams, shape: dict[str, Any], memory: int, ranks: int = 1
) -> tuple[str, str]:
    """What a step takes, in a line; and where that is more than `memory` bytes, what would help, else "".

    FluxError where the adapter alone, whose size is no estimate, has no room.
    """
    need = needed(options, params, shape, ranks)
    if need.adapter > memory:
        raise FluxError(
            f"training an adapter of rank {options.rank} needs {need.adapter / 1e9:,.0f} GB at least, and "
            f"there are {memory / 1e9:,.0f} GB; give a lower --lora-rank"
        )
    parts = {"weights": need.weights, "adapter": need.adapter, "activations": need.activations}
    text = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"memory: about {need.total / 1e9:.2f} GB ({text}), {memory / 1e9:.1f} GB here"
    return line, "" if need.total <= USABLE * memory else _advice(options, params, shape, memory, ranks)


def _advice(options: Options, params: FluxParams, shape: dict[str, Any], memory: int, ranks: int) -> str:
    height, width = shape["image_size"]
    half = f"{max(16, height // 32 * 16)}x{max(16, width // 32 * 16)}"
    steps: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("--grad-checkpoint", {"grad_checkpoint": True}, {}),
        ("--quantize 4", {"quantize": "4"}, {}),
        ("--batch-size 1", {}, {"batch": 1}),
        (f"--resolution {half}", {}, {"image_size": tuple(int(side) for side in half.split("x"))}),
        ("--lora-rank 4", {"rank": min(4, options.rank)}, {}),
    ]
    taken = []
    total = needed(options, params, shape, ranks).total
    for name, of_options, of_shape in steps:
        changed = replace(options, **of_options), shape | of_shape
        if (now := needed(changed[0], params, changed[1], ranks).total) < total:
            (options, shape), total = changed, now
            taken.append(name)
        if total <= USABLE * memory:
            return f"this will not fit; with {' '.join(taken)} about {total / 1e9:.2f} GB would do"
    return f"this will not fit, and even {' '.join(taken)} needs about {total / 1e9:.2f} GB"
