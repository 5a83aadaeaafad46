"""Adapters written and read again: the same bits, the same dW, the same facts; refusals."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.adapters import Adapter, Delta, Dense, Kronecker, LowRank, load, read_facts, save
from flux.adapters.changes import fold
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
    with pytest.raises(FluxError, match="no adapter format 'peft'"):
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
