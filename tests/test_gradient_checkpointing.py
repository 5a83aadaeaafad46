"""Gradient checkpointing by block: the same gradients to the bit, for less memory; and it can be undone."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from flux.adapters import Adapters, new_adapter, targets
from flux.models.layers import DoubleStreamBlock, SingleStreamBlock
from flux.models.transformer import Flux
from flux.training import gradient_checkpointing
from flux.training.flow_matching import FlowLoss
from flux.training.gradient_checkpointing import checkpoint_blocks, plain_blocks
from flux.weights.quantize import quantize

from .test_flow_matching import KEY, make_batch
from .tiny import FLUX, parameters, randomize

LOSS = FlowLoss(0.1, 0.4)


class Model(nn.Module):
    def __init__(self, flow: Flux):
        super().__init__()
        self.flow = flow


def make_model(
    bits: int | None = None, dropout: float = 0.0, dtype: mx.Dtype = mx.float32, which: str = "blocks"
) -> Model:
    flow = randomize(Flux(FLUX), 0)
    flow.set_dtype(dtype)
    if bits:
        quantize(flow, bits, 32)
    adapters = Adapters(flow)
    adapter = new_adapter(flow, targets(flow, which), 4, 4, mx.random.key(1))
    adapters.add(adapter, name="new", dropout=dropout, trainable=True)
    adapters.freeze_all_but("new")
    ups = {name: up for name, up in tree_flatten(flow.trainable_parameters()) if name.endswith(".up")}
    values = [0.2 * mx.random.normal(up.shape, key=mx.random.key(i)) for i, up in enumerate(ups.values())]
    flow.load_weights(list(zip(ups, values, strict=True)), strict=False)
    return Model(flow).train()


def gradients(model: Model, count: int = 2) -> dict[str, mx.array]:
    (loss, _), own = nn.value_and_grad(model, LOSS)(model, make_batch(count), KEY)
    return {"loss": loss} | dict(tree_flatten(own))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("bits", "dropout", "dtype"),
    [(None, 0.0, mx.float32), (4, 0.0, mx.float32), (None, 0.3, mx.float32), (8, 0.1, mx.bfloat16)],
)
def test_gradients_are_the_same_to_the_bit(bits, dropout, dtype, monkeypatch):
    model = make_model(bits, dropout, dtype)
    plain = gradients(model)
    before = parameters(model)
    checkpoint_blocks(model.flow)
    assert type(model.flow.double_blocks[0]) is gradient_checkpointing.CheckpointedDoubleStreamBlock
    assert same(gradients(model), plain)
    monkeypatch.setattr(gradient_checkpointing, "SCORES", 1)  # attention head by head
    assert same(gradients(model), plain)
    assert all(mx.abs(gradient).max() > 0 for gradient in plain.values())
    assert parameters(model).keys() == before.keys()
    plain_blocks(model.flow)
    assert type(model.flow.double_blocks[0]) is DoubleStreamBlock
    assert type(model.flow.single_blocks[0]) is SingleStreamBlock
    assert same(gradients(model), plain)


@pytest.mark.parametrize("which", ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"])
def test_blocks_without_a_trained_layer(which):
    """Before and after the one that has it."""
    model = make_model(which=which)
    plain = gradients(model)
    checkpoint_blocks(model.flow)
    assert same(gradients(model), plain)
    assert len(plain) == 3


def test_other_models_and_answers_stay():
    one, two = make_model(), make_model()
    batch = make_batch(1)
    answer = LOSS.per_sample(one, batch)
    checkpoint_blocks(one.flow)
    assert type(two.flow.double_blocks[0]) is DoubleStreamBlock
    gradients(one)
    assert mx.array_equal(LOSS.per_sample(one, batch), answer)


def test_less_memory():
    """Of a deep, narrow network: the blocks' insides are most of it."""

    def peak(checkpoint: bool) -> int:
        model = make_model()
        model.flow.single_blocks = [*model.flow.single_blocks * 4]
        if checkpoint:
            checkpoint_blocks(model.flow)
        mx.eval(model.parameters())
        mx.clear_cache()
        mx.reset_peak_memory()
        limit = mx.set_memory_limit(1)  # else the CPU's queue runs ahead, and holds what it will need later
        before = mx.get_active_memory()
        mx.eval(gradients(model, 16))
        mx.set_memory_limit(limit)
        return mx.get_peak_memory() - before

    assert peak(True) < 0.6 * peak(False)
