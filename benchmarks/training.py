"""Time and peak memory of a step of LoRA training, and what FLUX.1-dev will take.

    python -m benchmarks.training [--size tiny|mid] [--variants plain checkpointed ...] [--json FILE]
    python -m benchmarks.training --memory [--size tiny|mid]     # memory alone: quick, also of quantized ones
    python -m benchmarks.training --dev [--sides 512 1024]        # FLUX.1-dev's step, bfloat16 on 4 bits

Every measurement is a separate process. Two peaks: the growth of the resident set, which can be had of
both programs, and MLX's count with its operations one after the other. On a CPU, MLX hands out memory up
to a hundred operations ahead; the second peak is without that, and is the one that the calculation needs.

The reference is diffusers with PEFT: the same weights, noise and times, and the same layers; its qkv is in
three parts, each with separate matrices. An adapter begins as no change, so both losses must be equal.
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np

import flux  # noqa: F401  (before mlx.core: it puts OpenBLAS into the process)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks import generation
from benchmarks.measure import in_a_process, peak_memory
from benchmarks.standins import products_stand_in, weights_of_nothing
from flux import sampler
from flux.adapters import Adapters, new_adapter, targets
from flux.models.transformer import Flux, FluxParams
from flux.training import gradient_checkpointing, losses, optimizers
from flux.training.callbacks import Log
from flux.training.flow_matching import FlowLoss
from flux.training.gradient_checkpointing import checkpoint_blocks
from flux.training.memory import estimate, weight_bytes
from flux.training.trainer import Trainer, sample_key
from flux.weights import keymaps
from flux.weights.quantize import quantize

QUANTIZE = {"8": (8, "affine"), "4": (4, "affine"), "mxfp4": (4, "mxfp4")}
CHECKPOINTED = "checkpointed"
SIZES = {  # tokens: of the picture
    "tiny": generation.SIZES["tiny"],
    "mid": generation.SIZES["mid"] | {"tokens": 256, "text": 128},
}
OURS = tuple(f"{base}{end}" for base in ("plain", *QUANTIZE) for end in ("", f"+{CHECKPOINTED}"))
REFERENCE = ("reference", f"reference+{CHECKPOINTED}")
LOSS = FlowLoss(shift_factor=0.1159, scale_factor=0.3611)
RATE = 1e-4
RANK = 16
TEXT = 512  # tokens of FLUX.1-dev's text
# Double and single blocks that FLUX.1-dev is measured with, to find what one of each adds.
STACKS = ((1, 1), (2, 1), (1, 2))


def params_of(size: dict) -> FluxParams:
    """The transformer of this size."""
    return generation.shapes("step", size)[0]


def batch_of(params: FluxParams, tokens: int, text: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """A picture's moments and its text, at random, as `FlowLoss` takes them."""
    side = 2 * int(tokens**0.5)
    key = iter(mx.random.split(mx.random.key(0), 4))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(key)).astype(dtype)

    return {
        "mean": normal(1, side, side, params.in_channels // 4),
        "logvar": normal(1, side, side, params.in_channels // 4),
        "t5": normal(1, text, params.context_in_dim),
        "clip": normal(1, params.vec_in_dim),
        "is_reg": mx.zeros(1),
        "keys": sample_key(0, 0)[None],
        "times": mx.array([0.7]),
    }


class Model(nn.Module):
    def __init__(self, flow: Flux):
        super().__init__()
        self.flow = flow


def training(flow: Flux, batch: dict, variant: str, rank: int, optimizer: str = "adamw") -> Trainer:
    """As dreambooth.py trains by default."""
    base, _, checkpointed = variant.partition("+")
    if base in QUANTIZE:
        bits, mode = QUANTIZE[base]
        quantize(flow, bits, mode=mode)
    return _train_adapter(flow, batch, bool(checkpointed), rank, optimizer)


def _train_adapter(flow: Flux, batch: dict, checkpoint: bool, rank: int, optimizer: str) -> Trainer:
    flow.freeze()
    adapters = Adapters(flow)
    new = new_adapter(flow, targets(flow), rank, rank, mx.random.key(1))
    adapters.add(new, name="new", trainable=True)
    adapters.freeze_all_but("new")
    if checkpoint:
        checkpoint_blocks(flow)
    model = Model(flow).train()
    mx.eval(model.parameters(), batch)
    compiled = mx.default_device().type == mx.gpu
    rule = optimizers.make(optimizer, lambda step: mx.array(RATE))
    return Trainer(model, LOSS, lambda _: batch, rule, clip_norm=1.0, compiled=compiled, save_frozen=False)


def step_peak(trainer: Trainer) -> int:
    """MLX's peak in bytes of the trainer's next step, its operations one after the other; all that was
    there before counts too."""
    mx.clear_cache()
    mx.reset_peak_memory()
    limit = mx.set_memory_limit(1)  # above it, MLX waits for what it has begun
    trainer.run(trainer.step + 1)
    mx.set_memory_limit(limit)
    return mx.get_peak_memory()


def in_full(trainer: Trainer) -> None:
    """Zeros of a new adapter and of the optimizer's state are one zero that is seen everywhere; after an
    update they are not."""
    trainer.model.update(tree_map(mx.contiguous, trainer.model.trainable_parameters()))
    trainer.optimizer.state = tree_map(mx.contiguous, trainer.optimizer.state)
    mx.eval(trainer.model.trainable_parameters(), trainer.optimizer.state)


# --- A small network, in earnest ---


class Clock:
    """Laps in seconds, by the wall and of the processor: others may be at work on the machine."""

    def __init__(self):
        self._times = [(time.perf_counter(), time.process_time())]

    def lap(self) -> None:
        self._times.append((time.perf_counter(), time.process_time()))

    def fastest(self) -> dict[str, float]:
        """Of the laps after the first, each kind of time for itself."""
        laps = [np.subtract(b, a) for a, b in pairwise(self._times)][1:]
        return dict(zip(("seconds", "cpu"), map(float, np.min(laps, axis=0)), strict=True))


def measure(variant: str, size: dict, folder: Path, repeats: int, memory_only: bool) -> dict[str, float]:
    """In this process: seconds of the fastest of `repeats` steps after a first one, peaks, the first loss."""
    if variant in REFERENCE:
        return measure_reference(variant, size, folder, repeats)
    before = peak_memory()
    flow = Flux(params_of(size))
    weights = keymaps.to_ours("transformer", _weights(folder))
    flow.load_weights(list(weights.items()))
    del weights  # those that get quantized are not needed
    batch = batch_of(flow.params, size["tokens"], size["text"])
    with products_stand_in() if memory_only else nullcontext():
        trainer = training(flow, batch, variant, RANK)
        if memory_only:
            in_full(trainer)
            return {"mlx": step_peak(trainer)}
        loss, clock = [], Clock()
        for step in range(repeats + 1):
            trainer.run(step + 1, (Log(lambda _, means, seconds: loss.append(means["loss"])),))
            clock.lap()
        resident = peak_memory() - before
        return clock.fastest() | {"peak": resident, "mlx": step_peak(trainer), "loss": loss[0]}


def _weights(folder: Path) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], mx.load(str(folder / "weights.safetensors")))


def measure_reference(variant: str, size: dict, folder: Path, repeats: int) -> dict[str, float]:
    import diffusers
    import peft
    import torch
    from safetensors.torch import load_file

    diffusers.utils.logging.set_verbosity_error()
    before = peak_memory()
    network: Any = diffusers.FluxTransformer2DModel(**generation.shapes("step", size)[1])
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    layers = (
        r"(?:single_)?transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(?:_context)?\.net\.(?:0\.proj|2)|proj_mlp|proj_out)"
    )
    network.requires_grad_(False)
    network.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    if variant.endswith(CHECKPOINTED):
        network.enable_gradient_checkpointing()
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0)
    inputs = {name: torch.from_numpy(value) for name, value in np.load(folder / "inputs.npz").items()}
    target = inputs.pop("target")
    inputs |= {"guidance": torch.ones(1), "txt_ids": torch.zeros(size["text"], 3)}
    loss, clock = [], Clock()
    for _ in range(repeats + 1):
        error = ((network(**inputs).sample - target) ** 2).mean()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.append(error.item())
        clock.lap()
    return clock.fastest() | {"peak": peak_memory() - before, "loss": loss[0]}


def write_inputs(size: dict, folder: Path) -> None:
    """For the reference: what FlowLoss makes of the batch."""
    batch = batch_of(params_of(size), size["tokens"], size["text"])
    x0, noise, times = LOSS._draw(batch)
    arrays = {
        "hidden_states": sampler.pack(losses.noised(x0, noise, times)),
        "target": sampler.pack(noise - x0),
        "encoder_hidden_states": batch["t5"],
        "pooled_projections": batch["clip"],
        "timestep": times,
        "img_ids": sampler.image_positions((x0.shape[1], x0.shape[2]))[0],
    }
    saved: dict[str, Any] = {name: np.array(array) for name, array in arrays.items()}
    np.savez(folder / "inputs.npz", **saved)


def run(variants: list[str], size: str, repeats: int, memory_only: bool) -> dict[str, dict]:
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generation.write_weights("step", SIZES[size], folder)
        write_inputs(SIZES[size], folder)
        for variant in variants:
            options = ["--size", size, "--repeats", repeats, "--measure", variant, folder]
            rows[variant] = in_a_process("benchmarks.training", options + ["--memory"] * memory_only)
            print(show(variant, rows), flush=True)
    return rows


HEADS = "seconds by the wall and of the processor, to the first; peak of the resident set; MLX's peak; loss"


def show(variant: str, rows: dict[str, dict]) -> str:
    row, first = rows[variant], next(iter(rows.values()))
    line = f"{variant:<24}"
    if "seconds" in row:
        line += f"{row['seconds']:>9.3f} s{row['cpu']:>9.3f} s{row['cpu'] / first['cpu']:>8.2f} x"
        line += f"{row['peak'] / 1e6:>9.0f} MB{row['peak'] / first['peak']:>8.2f} x"
    line += f"{row['mlx'] / 1e6:>9.0f} MB{row['mlx'] / first['mlx']:>8.2f} x" if "mlx" in row else " " * 22
    return line + (f"{row['loss']:>12.6f}" if "loss" in row else "")


# --- FLUX.1-dev ---


def measure_dev(side: int, double: int, single: int, rank: int, share: int) -> dict[str, int]:
    """The peak of a step on so many of FLUX.1-dev's blocks, without the weights, at 1/share of its width: to
    that every activation and every matrix of the adapter is proportional, and the scores are to the heads."""
    full = FluxParams()
    params = replace(
        full,
        **{name: getattr(full, name) // share for name in ("hidden_size", "num_heads", "context_in_dim")},
        depth=double,
        depth_single_blocks=single,
    )
    flow = Flux(params)
    flow.set_dtype(mx.bfloat16)
    quantize(flow, 4)
    weights_of_nothing(flow)
    batch = batch_of(params, (side // 16) ** 2, TEXT, mx.bfloat16)
    scores = mock.patch.object(gradient_checkpointing, "SCORES", gradient_checkpointing.SCORES // share)
    with products_stand_in(), scores:
        trainer = _train_adapter(flow, batch, True, rank, "adamw")
        in_full(trainer)
        peak = step_peak(trainer)
    return {"peak": peak}


def run_dev(sides: list[int], rank: int, share: int) -> list[dict]:
    """What one block of each kind adds to a small stack, so often as FLUX.1-dev has it, and the weights."""
    full = FluxParams()
    weights = weight_bytes(full, 4)
    rows = []
    for side in sides:
        one, double, single = (
            share
            * in_a_process("benchmarks.training", ["--rank", rank, "--measure-dev", side, *stack, share])[
                "peak"
            ]
            for stack in STACKS
        )
        more = (full.depth - 1) * (double - one) + (full.depth_single_blocks - 1) * (single - one)
        expected = estimate(full, 4, (side, side), rank=rank, checkpoint=True).total
        rows.append({"side": side, "rank": rank, "weights": weights, "one": one})
        rows[-1] |= {"double": double - one, "single": single - one, "total": weights + one + more}
        print(
            f"{side}x{side}, rank {rank}: {rows[-1]['total'] / 1e9:.2f} GB: weights of 4 bits "
            f"{weights / 1e9:.2f}, a block of each kind {one / 1e9:.3f}, another double block "
            f"{(double - one) / 1e6:.1f} MB, single {(single - one) / 1e6:.1f} MB; the estimate that "
            f"dreambooth.py prints: {expected / 1e9:.2f} GB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="mid")
    add("--variants", nargs="+", choices=OURS + REFERENCE, help="default: all that are quick enough here")
    add("--repeats", type=int, default=3, help="timed steps; the fastest counts (default: 3)")
    add("--memory", action="store_true", help="peaks alone, with products that compute nothing")
    add("--dev", action="store_true", help="FLUX.1-dev, by the same means")
    add("--sides", nargs="+", type=int, default=(512, 1024), help="of FLUX.1-dev's pictures")
    add("--rank", type=int, default=RANK, help=f"of FLUX.1-dev's adapter (default {RANK})")
    add("--share", type=int, default=8, help="FLUX.1-dev is measured at 1/N of its width (default 8)")
    add("--json", type=Path, help="write the figures here too")
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # variant, folder: one measurement
    add("--measure-dev", nargs=4, type=int, help=argparse.SUPPRESS)  # side, double and single blocks
    args = parser.parse_args()
    if args.measure:
        variant, folder = args.measure
        size = SIZES[args.size]
        print(json.dumps(measure(variant, size, Path(folder), args.repeats, args.memory)))
        return
    if args.measure_dev:
        side, double, single, share = args.measure_dev
        print(json.dumps(measure_dev(side, double, single, args.rank, share)))
        return
    rows: list[dict] | dict[str, dict]
    if args.dev:
        rows = run_dev(args.sides, args.rank, args.share)
    else:
        reference = REFERENCE if find_spec("peft") and not args.memory else ()
        print(HEADS, flush=True)
        rows = run(args.variants or [*OURS, *reference], args.size, args.repeats, args.memory)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
