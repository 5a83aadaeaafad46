"""The transformer by itself: full-size names and shapes, the split call, gradients, types."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from flux.errors import FluxError
from flux.models import layers, transformer
from flux.models.layers import (
    DoubleStreamBlock,
    SelfAttention,
    SingleStreamBlock,
    attention,
    gelu,
    rotary_tables,
    rotate,
    silu,
)
from flux.models.transformer import Flux, FluxParams

REFERENCE = Path(__file__).parent / "reference"
TINY = FluxParams(
    in_channels=16,
    out_channels=12,
    vec_in_dim=20,
    context_in_dim=24,
    hidden_size=64,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)


def make_flow(params: FluxParams = TINY, dtype: mx.Dtype = mx.float32) -> Flux:
    mx.random.seed(1)
    flow = Flux(params)
    flow.update(tree_map(lambda p: (p + 0.2 * mx.random.normal(p.shape)).astype(dtype), flow.parameters()))
    mx.eval(flow.parameters())
    return flow


def make_inputs(batch: int, seed: int = 2) -> dict[str, mx.array]:
    mx.random.seed(seed)
    rows, columns = mx.meshgrid(mx.arange(3), mx.arange(5), indexing="ij")
    img_ids = mx.stack([mx.zeros_like(rows), rows, columns], axis=-1).reshape(1, 15, 3)
    return {
        "img": mx.random.normal((batch, 15, TINY.in_channels)),
        "img_ids": img_ids,
        "txt": mx.random.normal((batch, 7, TINY.context_in_dim)),
        "txt_ids": mx.zeros((1, 7, 3), dtype=img_ids.dtype),
        "timesteps": mx.random.uniform(0.1, 1, (batch,)),
        "y": mx.random.normal((batch, TINY.vec_in_dim)),
        "guidance": mx.random.uniform(1, 5, (batch,)),
    }


def relative_error(a: mx.array, b: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- Full size, without memory ---

DEV_SHAPES = {k: tuple(v) for k, v in json.loads((REFERENCE / "flux1-dev.bfl.json").read_text()).items()}
SCHNELL_SHAPES = {k: v for k, v in DEV_SHAPES.items() if not k.startswith("guidance_in.")}
FULL_SIZE = {
    "dev": (FluxParams(), DEV_SHAPES),
    "schnell": (FluxParams(guidance_embed=False), SCHNELL_SHAPES),
    "fill-dev": (FluxParams(in_channels=384), DEV_SHAPES | {"img_in.weight": (3072, 384)}),
    "canny-dev": (FluxParams(in_channels=128), DEV_SHAPES | {"img_in.weight": (3072, 128)}),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes(name: str):
    params, shapes = FULL_SIZE[name]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    parameters = tree_flatten(Flux(params).parameters())
    assert len(parameters) == (776 if name == "schnell" else 780)
    assert {k: v.shape for k, v in parameters} == shapes
    assert mx.get_peak_memory() - before < 64e6  # of 48 GB: nothing has been allocated


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_shapes_are_those_of_the_published_files(name: str, shared: Path):
    published = json.loads((shared / "reference" / f"flux1-{name}.bfl.json").read_text())
    assert {k: tuple(v) for k, v in published.items()} == FULL_SIZE[name][1]


def test_full_size_parameter_counts():
    def count(flow: Flux, *parts: str) -> int:
        return sum(
            v.size for k, v in tree_flatten(flow.parameters()) if not parts or any(p in k for p in parts)
        )

    flow = Flux(FluxParams())
    embedders = count(flow, "time_in.", "vector_in.", "guidance_in.", "final_layer.adaLN_modulation.")
    assert count(flow) == 11_901_408_320
    assert count(flow, "_mod.lin.", ".modulation.lin.") == 3_228_567_552
    flow.drop_modulation()
    assert count(flow) == 11_901_408_320 - 3_228_567_552 - embedders
    assert round(100 * (1 - count(flow) / 11_901_408_320), 1) == 27.6  # DESIGN.md


# --- The call in its parts ---


def test_split_call_equals_plain_call():
    flow, inputs = make_flow(), make_inputs(batch=2)
    times = [1.0, 0.713, 0.25]
    txt = flow.embed_text(inputs["txt"])
    pe = flow.positions(inputs["txt_ids"], inputs["img_ids"])
    modulations = flow.modulation(mx.array(times), inputs["y"], inputs["guidance"])
    mx.eval(modulations)
    assert pe.dtype == mx.float32
    assert len(modulations) == 3
    for t, modulation in zip(times, modulations, strict=True):
        split = flow.denoise(inputs["img"], txt, pe, modulation)
        plain = flow(**(inputs | {"timesteps": mx.full((2,), t)}))
        assert relative_error(split, plain) < 2e-6  # products of other sizes sum in another order


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_step_split_equals_plain_call_to_the_bit(dtype: mx.Dtype):
    flow, inputs = make_flow(dtype=dtype), make_inputs(batch=1)
    (modulation,) = flow.modulation(inputs["timesteps"], inputs["y"], inputs["guidance"])
    pe = flow.positions(inputs["txt_ids"], inputs["img_ids"])
    split = flow.denoise(inputs["img"], flow.embed_text(inputs["txt"]), pe, modulation)
    assert mx.array_equal(split, flow(**inputs))


def test_modulation_of_one_picture_serves_a_batch():
    flow, inputs = make_flow(), make_inputs(batch=3)
    y, guidance, time = inputs["y"][:1], inputs["guidance"][:1], inputs["timesteps"][:1]
    (modulation,) = flow.modulation(time, y, guidance)
    pe = flow.positions(inputs["txt_ids"], inputs["img_ids"])
    split = flow.denoise(inputs["img"], flow.embed_text(inputs["txt"]), pe, modulation)
    same = {k: mx.repeat(v, 3, axis=0) for k, v in (("y", y), ("guidance", guidance), ("timesteps", time))}
    assert relative_error(split, flow(**(inputs | same))) < 2e-6


def test_batch_equals_single_pictures():
    flow, inputs = make_flow(), make_inputs(batch=3)
    inputs["img_ids"] = inputs["img_ids"] + mx.arange(3)[:, None, None]  # positions of their own, too
    whole = flow(**inputs)
    for i in range(3):
        single = flow(**{k: v[i : i + 1] if v.shape[0] == 3 else v for k, v in inputs.items()})
        assert relative_error(single, whole[i : i + 1]) < 2e-6


def test_drop_modulation_leaves_exactly_what_denoise_needs():
    flow, inputs = make_flow(), make_inputs(batch=1)

    def modulation_sum(parameters: dict) -> mx.array:
        flow.update(parameters)
        (modulation,) = flow.modulation(inputs["timesteps"], inputs["y"], inputs["guidance"])
        return sum(a.sum() for _, a in tree_flatten(modulation))

    # A parameter is needed for modulation if and only if modulation has a gradient for it.
    parameters = flow.parameters()
    gradients = tree_flatten(mx.grad(modulation_sum)(parameters))
    flow.update(parameters)
    not_needed = {k for k, g in gradients if not mx.any(g != 0)}
    assert 0 < len(not_needed) < len(gradients)

    modulations = flow.modulation(inputs["timesteps"], inputs["y"], inputs["guidance"])
    mx.eval(modulations)
    pe = flow.positions(inputs["txt_ids"], inputs["img_ids"])
    before = flow.denoise(inputs["img"], flow.embed_text(inputs["txt"]), pe, modulations[0])
    mx.eval(before)
    flow.drop_modulation()
    assert {k for k, _ in tree_flatten(flow.parameters())} == not_needed
    after = flow.denoise(inputs["img"], flow.embed_text(inputs["txt"]), pe, modulations[0])
    assert mx.array_equal(before, after)
    with pytest.raises(RuntimeError, match="drop_modulation"):
        flow.modulation(inputs["timesteps"], inputs["y"], inputs["guidance"])
    flow.drop_modulation()  # twice does no harm


def test_drop_modulation_frees_the_memory():
    flow, inputs = make_flow(), make_inputs(batch=1)
    modulations = flow.modulation(inputs["timesteps"], inputs["y"], inputs["guidance"])
    mx.eval(modulations, inputs)
    size = sum(v.nbytes for _, v in tree_flatten(flow.parameters()))
    before = mx.get_active_memory()
    flow.drop_modulation()
    freed = size - sum(v.nbytes for _, v in tree_flatten(flow.parameters()))
    assert before - mx.get_active_memory() >= freed > 0


def test_guidance_is_required_where_the_model_has_the_embedder():
    inputs = make_inputs(batch=1)
    with pytest.raises(ValueError, match="guidance"):
        make_flow()(**(inputs | {"guidance": None}))
    without = FluxParams(**{**vars(TINY), "guidance_embed": False})
    assert make_flow(without)(**(inputs | {"guidance": None})).shape == (1, 15, 12)


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"axes_dim": (4, 6, 8)}, {"axes_dim": (5, 5, 6)}])
def test_impossible_heads_and_axes_are_refused(change: dict):
    with pytest.raises(FluxError):
        FluxParams(**{**vars(TINY), **change})


# --- Gradients ---


def loss_and_gradients(flow: Flux, inputs: dict[str, mx.array]) -> tuple[mx.array, dict]:
    step = nn.value_and_grad(flow, lambda: flow(**inputs).square().mean())
    loss, gradients = step()
    mx.eval(loss, gradients)
    return loss, dict(tree_flatten(gradients))


def test_every_parameter_has_a_gradient():
    _, gradients = loss_and_gradients(make_flow(), make_inputs(batch=2))
    assert len(gradients) == len(tree_flatten(make_flow().parameters()))
    assert all(mx.all(mx.isfinite(g)) for g in gradients.values())
    assert all(mx.any(g != 0) for k, g in gradients.items())


def test_checkpointing_every_block_changes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    flow, inputs = make_flow(), make_inputs(batch=2)
    loss, expected = loss_and_gradients(flow, inputs)
    calls = []

    def checkpointed(call):
        def wrapper(block: nn.Module, *arrays: mx.array):
            calls.append(block)
            return nn.utils.checkpoint(block, lambda *a: call(block, *a))(*arrays)

        return wrapper

    for kind in (DoubleStreamBlock, SingleStreamBlock):
        monkeypatch.setattr(kind, "__call__", checkpointed(kind.__call__))
    again, gradients = loss_and_gradients(flow, inputs)
    assert len(calls) == TINY.depth + TINY.depth_single_blocks
    assert mx.array_equal(loss, again)
    assert gradients.keys() == expected.keys()
    assert all(mx.array_equal(gradients[k], expected[k]) for k in expected)


def test_blocks_share_one_silu(monkeypatch: pytest.MonkeyPatch):
    """In MLX 0.32.4 compiled training of modulation layers fails if every block computes silu(vec) anew."""
    calls = []
    monkeypatch.setattr(transformer, "silu", lambda x: calls.append(x.shape) or silu(x))
    monkeypatch.setattr(nn.SiLU, "__call__", lambda self, x: pytest.fail("a silu of its own"))
    make_flow()(**make_inputs(batch=2))
    assert calls == [(2, TINY.hidden_size)]


# --- Sharded layers: the number of heads comes from the tensor ---


def rows(layer: nn.Linear, index: mx.array) -> nn.Linear:
    part = nn.Linear(layer.weight.shape[1], index.size)
    part.weight, part.bias = layer.weight[index], layer.bias[index]
    return part


def columns(layer: nn.Linear, index: mx.array) -> nn.Linear:
    part = nn.Linear(index.size, layer.weight.shape[0], bias=False)
    part.weight = layer.weight[:, index]
    return part


def test_single_block_on_two_ranks_sums_to_the_whole():
    size, mlp_size, heads = TINY.hidden_size, 4 * TINY.hidden_size, TINY.num_heads
    flow, x = make_flow(), mx.random.normal((2, 22, size))
    block, mod = flow.single_blocks[0], mx.random.normal((2, 1, 3 * size))
    inputs = make_inputs(batch=2)
    pe = flow.positions(inputs["txt_ids"], inputs["img_ids"])
    whole = block(x, pe, mod)
    parts = mod[..., 2 * size :] * block.linear2.bias  # the row-parallel layer's bias, once
    for rank in range(2):
        head_half = mx.split(mx.arange(size), 2)[rank]
        mlp_half = mx.split(mx.arange(mlp_size), 2)[rank]
        shard = SingleStreamBlock(size, heads, mlp_size)
        qkv_rows = [head_half + i * size for i in range(3)]
        shard.linear1 = rows(block.linear1, mx.concatenate([*qkv_rows, mlp_half + 3 * size]))
        shard.linear2 = columns(block.linear2, mx.concatenate([head_half, mlp_half + size]))
        shard.norm = block.norm
        parts = parts + shard(x, pe, mod) - x
    assert relative_error(x + parts, whole) < 2e-6


def test_self_attention_on_a_rank_has_its_share_of_the_heads():
    size = TINY.hidden_size
    layer, x = SelfAttention(size, size // 4, qkv_bias=True), mx.random.normal((2, 9, size))
    whole = layer.heads(x)
    half = mx.arange(size // 2)
    layer.qkv = rows(layer.qkv, mx.concatenate([half + i * size for i in range(3)]))
    for part, of in zip(layer.heads(x), whole, strict=True):
        assert part.shape == (2, 2, 9, size // 4)
        assert relative_error(part, of[:, :2]) < 1e-6


# --- Types and numbers ---


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_output_has_the_weights_type(dtype: mx.Dtype):
    flow, inputs = make_flow(dtype=dtype), make_inputs(batch=1)
    out = flow(**inputs)
    assert out.dtype == dtype
    assert mx.all(mx.isfinite(out))
    assert flow.embed_text(inputs["txt"]).dtype == dtype


def test_float16_activations_stay_finite_where_blocks_hand_over():
    flow, inputs = make_flow(dtype=mx.float16), make_inputs(batch=1)
    pe = flow.positions(inputs["txt_ids"], inputs["img_ids"])
    img, txt = (mx.full((1, n, TINY.hidden_size), 6e4, dtype=mx.float16) for n in (15, 7))
    mod = mx.full((1, 1, 6 * TINY.hidden_size), 3e4, dtype=mx.float16)
    for x in flow.double_blocks[0](txt, img, pe, mx.zeros_like(mod), mx.zeros_like(mod)):
        assert mx.all(x == 6e4)  # nothing is clipped that need not be
    outs = flow.double_blocks[0](txt, img, pe, 1e-3 * mod, 1e-3 * mod)
    outs += (
        flow.single_blocks[0](
            mx.concatenate([txt, img], axis=1), pe, 1e-3 * mod[..., : 3 * TINY.hidden_size]
        ),
    )
    for x in outs:
        assert mx.all(mx.isfinite(x))
        assert mx.max(mx.abs(x)) == 65504


@pytest.mark.parametrize(("dtype", "eps"), [(mx.float32, 3e-7), (mx.bfloat16, 4e-3), (mx.float16, 5e-4)])
def test_silu(dtype: mx.Dtype, eps: float):
    x = mx.concatenate([mx.linspace(-12, 12, 4801), mx.array([-6e4, -300, -70, 70, 300, 6e4])]).astype(dtype)
    points = np.array(x.astype(mx.float32), dtype=np.float64)
    s = 1 / (1 + np.exp(np.minimum(-points, 700)))
    y, gradient = silu(x), mx.grad(lambda x: silu(x).astype(mx.float32).sum())(x)
    assert y.dtype == gradient.dtype == dtype
    assert np.all(np.abs(np.array(y.astype(mx.float32)) - points * s) <= eps * np.abs(points * s) + 1e-6)
    slope = s * (1 + points * (1 - s))
    assert np.all(np.abs(np.array(gradient.astype(mx.float32)) - slope) <= 2 * eps + 1e-6)


def test_exp_is_exact_on_this_machine():
    x = np.linspace(-30, 30, 20001).astype(np.float32)
    share = np.abs(np.array(layers._exp(mx.array(x))) / np.exp(x.astype(np.float64)) - 1)
    assert share.max() < 1.2e-6
    assert layers._exp(mx.array(1e9)).item() == pytest.approx(np.exp(80), rel=1e-5)


def gelu64(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("dtype", "eps"), [(mx.float32, 3e-7), (mx.bfloat16, 4e-3), (mx.float16, 5e-4)])
def test_gelu(dtype: mx.Dtype, eps: float):
    x = mx.concatenate([mx.linspace(-12, 12, 4801), mx.array([-6e4, -300, -50, 50, 300, 6e4])]).astype(dtype)
    points = np.array(x.astype(mx.float32), dtype=np.float64)
    expected = gelu64(points)
    y = gelu(x)
    assert y.dtype == dtype
    error = np.abs(np.array(y.astype(mx.float32)) - expected)
    assert np.all(error <= eps * np.abs(expected) + 1e-6)
    gradient = mx.grad(lambda x: gelu(x).astype(mx.float32).sum())(x).astype(mx.float32)
    assert mx.all(mx.isfinite(gradient))
    slope = (gelu64(points + 1e-5) - gelu64(points - 1e-5)) / 2e-5
    assert np.all(np.abs(np.array(gradient) - slope) <= 2 * eps + 3e-6)
    assert mx.all(gradient[-3:] == 1)
    assert mx.all(mx.abs(gradient[-6:-3]) < 1e-6)


@pytest.mark.parametrize(
    "function", [layers._gelu, layers._gelu_gradient, layers._silu, layers._silu_gradient, rotate]
)
def test_compiled_as_on_a_gpu_is_the_same_function(function):
    arrays = [mx.random.normal((2, 3, 5, 8)).astype(mx.bfloat16)]
    if function is rotate:
        arrays.append(mx.random.normal((2, 2, 1, 5, 4)))
    if function in (layers._gelu_gradient, layers._silu_gradient):
        arrays.append(mx.random.normal((2, 3, 5, 8)).astype(mx.bfloat16))
    compiled = mx.compile(function.__wrapped__)(*arrays)
    assert compiled.dtype == mx.bfloat16
    assert relative_error(compiled, function(*arrays)) < 4e-3


def test_rotation_depends_on_the_distance_of_positions_alone():
    mx.random.seed(3)
    q, k, v = (mx.random.normal((1, 2, 6, 16)) for _ in range(3))
    ids = mx.random.randint(0, 9, (1, 6, 3))
    here = attention(q, k, v, rotary_tables(ids, (4, 6, 6), 10000))
    there = attention(q, k, v, rotary_tables(ids + mx.array([3, 11, 7]), (4, 6, 6), 10000))
    nowhere = attention(q, k, v, rotary_tables(mx.zeros_like(ids), (4, 6, 6), 10000))
    assert relative_error(there, here) < 1e-5
    assert relative_error(nowhere, here) > 1e-2
