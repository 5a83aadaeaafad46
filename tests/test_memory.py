"""The estimate of a training step's memory, beside the step's real peak."""

import gc
import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from flux.adapters import Adapters, new_adapter, targets
from flux.models.transformer import Flux, FluxParams
from flux.training import optimizers
from flux.training.flow_matching import FlowLoss
from flux.training.gradient_checkpointing import checkpoint_blocks
from flux.training.memory import estimate, weight_bytes
from flux.training.trainer import Trainer, sample_key
from flux.weights.quantize import QUANTIZED, quantize

SIDE, TEXT, RANK = 320, 64, 4  # pixels, tokens
SHAPE = {"vec_in_dim": 32, "context_in_dim": 48}
TINY = FluxParams(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=3, **SHAPE)
MID = FluxParams(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=2, **SHAPE)


def peak(params: FluxParams, bits: int | None, checkpoint: bool) -> int:
    """Bytes of the second step: before the first, an optimizer's state is zeros that take no memory."""
    gc.collect()  # else what is left of earlier tests may go while this one measures
    before = mx.get_active_memory()
    flow = Flux(params)
    if bits:
        quantize(flow, bits)
    adapters = Adapters(flow)
    adapters.add(new_adapter(flow, targets(flow), RANK, RANK, mx.random.key(0)), name="new", trainable=True)
    adapters.freeze_all_but("new")
    if checkpoint:
        checkpoint_blocks(flow)
    model = nn.Module()
    model.flow = flow
    batch = {
        **{name: mx.random.normal((1, SIDE // 8, SIDE // 8, 16)) for name in ("mean", "logvar")},
        "t5": mx.random.normal((1, TEXT, SHAPE["context_in_dim"])),
        "clip": mx.random.normal((1, SHAPE["vec_in_dim"])),
        "is_reg": mx.zeros(1),
        "keys": sample_key(0, 0)[None],
    }
    mx.eval(model.parameters(), batch)
    rule = optimizers.make("adamw", lambda step: mx.array(1e-4))
    trainer = Trainer(model, FlowLoss(0.1, 0.4), lambda _: batch, rule, clip_norm=1.0, compiled=False)
    trainer.run(1)
    mx.reset_peak_memory()
    limit = mx.set_memory_limit(1)  # else the CPU's queue runs ahead, and holds what it will need later
    trainer.run(2)
    mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("params", "bits", "checkpoint"),
    [(TINY, None, False), (TINY, None, True), (MID, None, False), (MID, None, True), (TINY, 4, True)],
)
def test_a_real_step(params, bits, checkpoint):
    expected = estimate(
        params, bits, (SIDE, SIDE), rank=RANK, checkpoint=checkpoint, text_tokens=TEXT, element_size=4
    )
    # The least of three: work that runs ahead of the CPU's queue can only add to a peak.
    least = min(peak(params, bits, checkpoint) for _ in range(3))
    assert least == pytest.approx(expected.total, rel=0.15)


@pytest.mark.parametrize(
    ("bits", "mode", "each"), [(4, "affine", 4.5), (8, "affine", 8.5), (4, "mxfp4", 4.25)]
)
def test_weights_by_the_names_of_the_checkpoint(bits, mode, each):
    """Of the 780 tensors of FLUX.1-dev; each: bits of a weight with its share of the scales."""
    table = json.loads((Path(__file__).parent / "reference/flux1-dev.bfl.json").read_text())
    total = 0
    for name, shape in table.items():
        small = name.startswith(QUANTIZED) and len(shape) == 2
        total += math.prod(shape) * (each if small else 16) / 8
    assert len(table) == 780
    assert weight_bytes(FluxParams(), bits, mode) == total
