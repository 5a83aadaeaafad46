"""Adapters written and read again: the same bits, the same dW, the same facts; refusals."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.adapters import Adapter, Delta, Dense, Kronecker, LowRank, load, read_facts, save
from flux.adapters.changes import (
    LYCORIS,
    PEFT,
    GLoRA,
    Hadamard,
    Replacement,
    Rotation,
    Scaling,
    Stack,
    fold,
)
from flux.errors import FluxError

from .adapter_files import CLIP_LAYER, HIDDEN, RANK, SHAPES, T5_LAYER, close, dense, normal, pair


def whole_adapter(alpha: float = 2.0, dtype: mx.Dtype = mx.float32) -> Adapter:
    modules = {}
    for name, shape in SHAPES.items():
        down, up = pair(*shape)
        modules[name] = Delta(LowRank(mx.array(down).astype(dtype), mx.array(up).astype(dtype), alpha))
    down, up = pair(HIDDEN, HIDDEN)
    modules[CLIP_LAYER] = Delta(LowRank(mx.array(down), mx.array(up), alpha))
    return Adapter(modules)


def same(a: Delta, b: Delta) -> bool:
    """To the bit and in type."""
    x, y = (
        [*vars(d.change).values(), d.bias, d.magnitude] if d.change else [d.bias, d.magnitude] for d in (a, b)
    )
    return type(a.change) is type(b.change) and all(
        p.dtype == q.dtype and mx.array_equal(p, q) if isinstance(p, mx.array) else p == q
        for p, q in zip(x, y, strict=True)
    )


def round_trip(adapter: Adapter, format: str, folder: Path) -> Adapter:
    save(folder / "a.safetensors", adapter, format)
    return load(folder / "a.safetensors", strict=True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("format", ["native", "kohya"])
def test_round_trip_keeps_every_bit(format: str, dtype: mx.Dtype, tmp_path: Path):
    adapter = whole_adapter(2.5, dtype)
    found = round_trip(adapter, format, tmp_path)
    assert found.modules.keys() == adapter.modules.keys()
    assert all(same(found.modules[name], delta) for name, delta in adapter.modules.items())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("alpha", [3.0, 1.5, 1.0, -2.0])
def test_round_trip_through_diffusers(alpha: float, dtype: mx.Dtype, tmp_path: Path):
    """Exact where alpha / rank is a power of two (fused again, too); else the same dW."""
    adapter = whole_adapter(alpha, dtype)
    found = round_trip(adapter, "diffusers", tmp_path)
    assert found.modules.keys() == adapter.modules.keys()
    for name, delta in adapter.modules.items():
        change = found.modules[name].change
        assert change.alpha == change.rank == RANK
        assert close(change.dense(), np.array(delta.change.dense())), name
        if alpha == RANK:
            assert same(found.modules[name], delta), name
    again = round_trip(found, "diffusers", tmp_path)
    assert all(same(again.modules[name], delta) for name, delta in found.modules.items())


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0625, 8.0, 1 / 3, 0.7, -0.25])
def test_fold(scale: float):
    a, b = mx.array(normal(5, 3)).astype(mx.bfloat16), mx.array(normal(3, 4)).astype(mx.bfloat16)
    x, y = fold(scale, a, b)
    wide = [np.array(w.astype(mx.float32), dtype=np.float64) for w in (a, b, x, y)]
    expected = scale * (wide[0] @ wide[1])
    assert np.linalg.norm(wide[2] @ wide[3] - expected) <= 2e-7 * np.linalg.norm(expected)
    if scale in (1.0, 0.5, 0.0625, 8.0):
        assert x.dtype == y.dtype == mx.bfloat16
        assert np.array_equal(wide[2] @ wide[3], expected)


KINDS = {
    "LoHa": lambda: Hadamard(*(mx.array(normal(*s)) for s in ((8, 3), (3, 8), (8, 3), (3, 8))), 0.5),
    "GLoRA": lambda: GLoRA(*(mx.array(normal(*s)) for s in ((8, 3), (3, 8), (8, 3), (3, 8))), 0.5),
    "(IA)3 of rows": lambda: Scaling(mx.array(normal(8, 1))),
    "(IA)3 of columns": lambda: Scaling(mx.array(normal(1, 8))),
}


@pytest.mark.parametrize("format", ["native", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_come_back(kind: str, format: str, tmp_path: Path):
    name = "double_blocks.0.txt_attn.proj"
    change = KINDS[kind]()
    found = round_trip(Adapter({name: Delta(change, mx.array(normal(8)))}), format, tmp_path).modules[name]
    assert type(found.change) is type(change)
    weight = mx.array(normal(8, 8))
    assert close(found.change.delta(weight), np.array(change.delta(weight)))


def test_parts_of_unlike_kinds(tmp_path: Path):
    """Native files have diffusers' names for them; kohya's the sum, where that is the same for every base."""
    name, rows = "double_blocks.1.img_attn.qkv", 3 * HIDDEN
    down, up = pair(HIDDEN, HIDDEN)
    first = Delta(Kronecker(mx.array(normal(2, 2)), mx.array(normal(4, 4)), 0.5))
    last = Delta(LowRank(mx.array(down), mx.array(up), 2.0))
    whole = Adapter({name: Delta(Stack(((0, HIDDEN, first), (2 * HIDDEN, rows, last)), rows))})
    for format, kind in (("native", Stack), ("kohya", Dense)):
        found = round_trip(whole, format, tmp_path).modules[name].change
        assert isinstance(found, kind)
        assert close(found.dense(), np.array(whole.modules[name].change.dense()))
    columns = Delta(last.change, magnitude=mx.ones((1, HIDDEN)), rule=LYCORIS)
    dora = Adapter({name: Delta(Stack(((0, HIDDEN, columns),), rows))})
    found = round_trip(dora, "native", tmp_path).modules[name].change
    ((start, end, part),) = found.parts
    assert (start, end) == (0, HIDDEN)
    assert mx.array_equal(part.magnitude, columns.magnitude)
    for format in ("kohya", "diffusers", "ai-toolkit"):
        with pytest.raises(FluxError, match=f"{format} files cannot hold"):
            save(tmp_path / "a.safetensors", dora, format)


@pytest.mark.parametrize("rule", [PEFT, LYCORIS])
def test_a_dora_is_weighed_as_before_in_the_new_file(rule: str, tmp_path: Path):
    down, up = pair(HIDDEN, HIDDEN)
    delta = Delta(LowRank(mx.array(down), mx.array(up), 2.0), magnitude=mx.array(normal(HIDDEN)), rule=rule)
    for format in ("native", "kohya"):
        found = round_trip(Adapter({"double_blocks.0.txt_attn.proj": delta}), format, tmp_path)
        (delta,) = found.modules.values()
        assert delta.rule == rule
    assert round_trip(found, "diffusers", tmp_path).modules.popitem()[1].rule == PEFT


@pytest.mark.parametrize("format", ["native", "kohya", "diffusers", "ai-toolkit"])
@pytest.mark.parametrize(
    "delta",
    [
        Delta(Rotation(mx.zeros((1, 2, 4, 4)))),
        Delta(Replacement(mx.zeros((8, 8)))),
        Delta(new_bias=mx.zeros((8,))),
        Delta(Scaling(mx.zeros((8, 1))), bias_factor=mx.zeros((8,))),
    ],
    ids=["rotation", "whole layer", "new bias", "scaled bias"],
)
def test_kinds_that_no_format_holds(delta: Delta, format: str, tmp_path: Path):
    adapter = Adapter({"double_blocks.0.txt_attn.proj": delta})
    with pytest.raises(FluxError, match=f"{format} files cannot hold .*txt_attn"):
        save(tmp_path / "a.safetensors", adapter, format)
    assert not list(tmp_path.iterdir())


def test_ai_toolkit(tmp_path: Path):
    """diffusers' names, split, without alpha or a config."""
    adapter = Adapter({name: d for name, d in whole_adapter(alpha=1.5).modules.items() if name != CLIP_LAYER})
    found = round_trip(adapter, "ai-toolkit", tmp_path)
    keys = mx.load(str(tmp_path / "a.safetensors"))
    assert all(key.startswith("transformer.") and ".lora_" in key for key in keys)
    assert "lora_adapter_metadata" not in found.metadata
    for name, delta in adapter.modules.items():
        assert close(found.modules[name].change.dense(), np.array(delta.change.dense())), name
    with pytest.raises(FluxError, match="ai-toolkit files cannot hold text encoders"):
        save(tmp_path / "b.safetensors", whole_adapter(), "ai-toolkit")


def test_what_other_programs_leave_out_is_said(tmp_path: Path):
    blocks = Adapter(
        {"double_blocks.0.txt_attn.proj": whole_adapter().modules["double_blocks.0.txt_attn.proj"]}
    )
    path = tmp_path / "a.safetensors"
    assert all(save(path, blocks, format) == [] for format in ("native", "kohya", "diffusers", "ai-toolkit"))
    assert save(path, whole_adapter(), "diffusers") == []
    for format, who in (("native", "diffusers"), ("kohya", "diffusers and sd-scripts")):
        first, last = save(path, whole_adapter(), format)
        assert first.startswith(f"{who} will leave out the layers outside of the blocks (")
        assert "img_in" in first
        assert last == "ComfyUI reads all of it"


def full_adapter() -> Adapter:
    """Every kind of change at once."""
    adapter = whole_adapter()
    first = adapter.modules["double_blocks.1.img_attn.qkv"].change
    adapter.modules["double_blocks.1.img_attn.qkv"] = Delta(first, magnitude=mx.array(normal(3 * HIDDEN)))
    adapter.modules["txt_in"] = Delta(Kronecker(mx.array(normal(2, 3)), mx.array(normal(4, 2)), 1.0))
    adapter.modules["img_in"] = Delta(Dense(mx.array(normal(HIDDEN, 4))), mx.array(normal(HIDDEN)))
    adapter.modules["vector_in.in_layer"] = Delta(bias=mx.array(normal(HIDDEN)))
    adapter.modules[T5_LAYER] = Delta(LowRank(mx.array(normal(2, 4)), mx.array(normal(5, 2)), 1.0))
    replaced = {"double_blocks.0.img_attn.norm.query_norm.scale": mx.array(normal(4))}
    added = {"single_blocks.0.norm.key_norm.scale": mx.array(normal(4))}
    return Adapter(adapter.modules, replaced, added)


def test_native_holds_everything(tmp_path: Path):
    adapter = full_adapter()
    found = round_trip(adapter, "native", tmp_path)
    assert found.modules.keys() == adapter.modules.keys()
    assert all(same(found.modules[name], delta) for name, delta in adapter.modules.items())
    for kind in ("replaced", "added"):
        ours, theirs = getattr(adapter, kind), getattr(found, kind)
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    full = full_adapter()
    with pytest.raises(FluxError, match=r"kohya.*norms.*query_norm"):
        save(path, full, "kohya")
    with pytest.raises(FluxError, match=r"diffusers.*not of low rank.*img_in"):
        save(path, full, "diffusers")
    t5 = Adapter({T5_LAYER: full.modules[T5_LAYER]})
    with pytest.raises(FluxError, match=r"diffusers.*T5.*encoder\.block\.23"):
        save(path, t5, "diffusers")
    with pytest.raises(FluxError, match="unknown adapter format 'peft'"):
        save(path, t5, "peft")
    with pytest.raises(FluxError, match="colour"):
        save(path, t5, "native", {"colour": "red"})
    assert not list(tmp_path.iterdir())


def test_lokr_scale_is_folded(tmp_path: Path):
    change = Kronecker(mx.array(normal(2, 3)), mx.array(normal(4, 2)), 0.7)
    for format in ("native", "kohya"):
        found = round_trip(Adapter({"txt_in": Delta(change)}), format, tmp_path)
        assert close(dense(found, "txt_in"), np.array(change.dense()))


FACTS = {"base_model": "dev", "trigger": "sks dog", "steps": "600", "dataset_hash": "abc"}


@pytest.mark.parametrize("format", ["native", "kohya", "diffusers"])
def test_metadata(format: str, tmp_path: Path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(first, whole_adapter(), format, FACTS)
    adapter = load(first)
    assert read_facts(adapter.metadata) == FACTS
    assert adapter.metadata["flux_mlx.rank"] == str(RANK)
    if format == "kohya":
        assert adapter.metadata["ss_network_dim"] == str(RANK)
        assert adapter.metadata["ss_network_alpha"] == "2"
        assert adapter.metadata["modelspec.architecture"] == "flux-1-dev/lora"
        assert adapter.metadata["modelspec.trigger_phrase"] == "sks dog"
    for other in ("native", "kohya", "diffusers"):  # a conversion keeps the facts and drops what is stale
        save(second, adapter, other)
        metadata = load(second).metadata
        assert read_facts(metadata) == FACTS
        assert ("lora_adapter_metadata" in metadata) == (other == "diffusers")


def test_facts_of_kohya_files():
    metadata = {
        "ss_sd_model_name": "flux1-dev.safetensors",
        "modelspec.trigger_phrase": "tjtoy toy",
        "ss_steps": "9",
    }
    assert read_facts(metadata) == {
        "base_model": "flux1-dev.safetensors",
        "trigger": "tjtoy toy",
        "steps": "9",
    }
