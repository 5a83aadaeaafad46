"""Sums of adapters, smaller ranks, LoRAs from two checkpoints: beside numpy's own singular values."""

import mlx.core as mx
import numpy as np
import pytest

from flux.adapters import Adapter, Adapters, Delta, Dense, Kronecker, LowRank, save
from flux.adapters.arithmetic import extract, merge, nearest, resize, share_kept
from flux.adapters.beside import dense_weight
from flux.adapters.lora import linears
from flux.errors import FluxError
from flux.models.transformer import Flux

from . import tiny
from .adapter_files import HIDDEN, normal, pair

QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
NORM = "double_blocks.0.img_attn.norm.query_norm.scale"


def low_rank(rows: int = HIDDEN, columns: int = HIDDEN, rank: int = 3, alpha: float = 2.0) -> LowRank:
    down, up = pair(rows, columns, rank)
    return LowRank(mx.array(down), mx.array(up), alpha)


def error(a: mx.array, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.array(a) - b) / np.linalg.norm(b))


def test_merged_adapters_are_their_sum():
    """Different ranks, layers, alphas, types and strengths; biases and norms too."""
    first = Adapter({QKV: Delta(low_rank(3 * HIDDEN)), PROJ: Delta(low_rank(), mx.array(normal(HIDDEN)))})
    change = low_rank(3 * HIDDEN, rank=2, alpha=5.0)
    half = LowRank(change.down.astype(mx.bfloat16), change.up.astype(mx.bfloat16), change.alpha)
    second = Adapter({QKV: Delta(half)}, added={NORM: mx.array(normal(4))})
    both = merge([("a", first, 0.7), ("b", second, -0.3)])
    qkv = both.modules[QKV].change
    assert qkv.rank == qkv.alpha == 5
    expected = 0.7 * np.array(first.modules[QKV].change.dense()) - 0.3 * np.array(half.dense())
    assert error(qkv.dense(), expected) <= 1e-6
    assert (
        error(both.modules[PROJ].change.dense(), 0.7 * np.array(first.modules[PROJ].change.dense())) <= 1e-6
    )
    assert error(both.modules[PROJ].bias, 0.7 * np.array(first.modules[PROJ].bias)) <= 1e-6
    assert error(both.added[NORM], -0.3 * np.array(second.added[NORM])) <= 1e-6


def test_a_merged_adapter_acts_as_both_beside_each_other():
    model, other = (tiny.randomize(Flux(tiny.FLUX), 3) for _ in range(2))
    names = list(linears(model))[:6]
    shapes = {name: dense_weight(layer).shape for name, layer in linears(model).items()}
    adapters = [Adapter({name: Delta(low_rank(*shapes[name])) for name in names}) for _ in range(2)]
    beside = Adapters(model)
    for adapter, strength in zip(adapters, (0.7, 0.3), strict=True):
        beside.add(adapter, strength)
    beside.fuse()
    merged = Adapters(other)
    merged.add(merge([("a", adapters[0], 0.7), ("b", adapters[1], 0.3)]))
    merged.fuse()
    for name, layer in linears(model).items():
        assert error(dense_weight(linears(other)[name]), np.array(dense_weight(layer))) <= 1e-6, name


def test_kinds_that_are_no_product_of_two_become_dense():
    kron = Kronecker(mx.array(normal(2, 2)), mx.array(normal(4, 4)), 0.5)
    own = low_rank()
    both = merge([("a", Adapter({PROJ: Delta(kron)}), 1.0), ("b", Adapter({PROJ: Delta(own)}), 0.5)])
    assert isinstance(both.modules[PROJ].change, Dense)
    assert (
        error(both.modules[PROJ].change.dense(), np.array(kron.dense()) + 0.5 * np.array(own.dense())) <= 1e-6
    )
    small = merge([("a", Adapter({PROJ: Delta(kron)}), 1.0), ("b", Adapter({PROJ: Delta(own)}), 0.5)], 2)
    assert small.ranks() == {PROJ: 2}


def test_what_has_no_sum_is_refused():
    dora = Adapter({PROJ: Delta(low_rank(), magnitude=mx.ones(HIDDEN))})
    with pytest.raises(FluxError, match=r"b: .*depends on the base weights.*img_attn\.proj"):
        merge([("a", Adapter({PROJ: Delta(low_rank())}), 1.0), ("b", dora, 1.0)])
    with pytest.raises(FluxError, match="layers of different sizes"):
        merge([(str(n), Adapter({PROJ: Delta(low_rank(n))}), 1.0) for n in (4, 8)])


@pytest.mark.parametrize("rank", [1, 3, 7, 40])
@pytest.mark.parametrize("kind", ["low rank", "dense", "Kronecker"])
def test_the_nearest_change_of_a_rank(kind: str, rank: int):
    """As close as singular values allow, and the energy as they say."""
    change = {
        "low rank": low_rank(24, 16, rank=8),
        "dense": Dense(mx.array(normal(24, 16))),
        "Kronecker": Kronecker(mx.array(normal(3, 4)), mx.array(normal(8, 4)), 0.5),
    }[kind]
    dense = np.array(change.dense())
    u, s, vt = np.linalg.svd(dense)
    best = (u[:, :rank][:, : len(s)] * s[:rank]) @ vt[:rank][: len(s)]
    found, kept, total = nearest(change, rank)
    assert found.rank <= rank
    assert error(found.dense(), best) <= 1e-5
    assert abs(kept - (s[:rank] ** 2).sum()) <= 1e-5 * total
    assert abs(total - (dense**2).sum()) <= 1e-5 * total


def test_a_large_matrix_is_nearly_as_close_as_can_be():
    """Without all singular values: a spectrum that falls slowly, as that of a full fine-tune."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, 560)))[0] for n in (700, 560))
    s = 1 / np.sqrt(1 + np.arange(560))
    change = Dense(mx.array(((u * s) @ v.T).astype(np.float32)))
    found, kept, total = nearest(change, 16)
    best = np.linalg.norm(s[16:])
    assert np.linalg.norm(np.array(change.dense()) - np.array(found.dense())) <= 1.001 * best
    assert abs(kept / (s[:16] ** 2).sum() - 1) <= 2e-3
    assert total >= kept


def test_resized_adapters_keep_their_types_biases_and_scales():
    down, up = (array.astype(mx.float16) for array in (low_rank().down, low_rank().up))
    bias, magnitude = mx.array(normal(HIDDEN)), mx.ones(HIDDEN)
    adapter = Adapter({PROJ: Delta(LowRank(down, up, 1.0), bias, magnitude)}, metadata={"a": "b"})
    small, energies = resize(adapter, 2)
    change = small.modules[PROJ].change
    assert change.rank == 2
    assert change.down.dtype == mx.float16
    assert mx.array_equal(small.modules[PROJ].bias, bias)
    assert mx.array_equal(small.modules[PROJ].magnitude, magnitude)
    assert small.metadata == {"a": "b"}
    assert 0 < share_kept(energies) < 1
    assert abs(share_kept(resize(adapter, 3)[1]) - 1) <= 1e-6


def fine_tuned(seed: int, rank: int) -> Flux:
    """The tiny transformer, every layer changed by a matrix of this rank, and a bias and a norm."""
    model = tiny.randomize(Flux(tiny.FLUX), 3)
    rng = np.random.default_rng(seed)
    for layer in linears(model).values():
        rows, columns = layer.weight.shape
        change = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)) / columns
        layer.weight = layer.weight + mx.array(change.astype(np.float32))
    model.img_in.bias = model.img_in.bias + 0.5
    norm = model.double_blocks[0].img_attn.norm.query_norm
    norm.scale = norm.scale + 0.25
    return model


def test_extracted_adapters_give_the_fine_tuned_model():
    tuned = {name: np.array(w) for name, w in tiny.parameters(fine_tuned(1, 2)).items()}
    adapter, energies = extract(tiny.randomize(Flux(tiny.FLUX), 3), fine_tuned(1, 2), 4)
    assert set(adapter.ranks().values()) == {4}
    assert share_kept(energies) >= 1 - 1e-6
    model = tiny.randomize(Flux(tiny.FLUX), 3)
    adapters = Adapters(model)
    assert adapters.add(adapter) == {}
    adapters.fuse()
    for name, w in tiny.parameters(model).items():
        assert error(w, tuned[name]) <= 1e-5, name


def test_extracting_lets_go_of_layers_and_skips_equal_ones():
    base, tuned = tiny.randomize(Flux(tiny.FLUX), 3), tiny.randomize(Flux(tiny.FLUX), 3)
    tuned.img_in.weight = tuned.img_in.weight + 1
    adapter, _ = extract(base, tuned, 2)
    assert list(adapter.modules) == ["img_in"]
    assert not any("weight" in layer for layer in (base.img_in, tuned.txt_in))


def test_checkpoints_that_are_equal_or_not_alike():
    with pytest.raises(FluxError, match="nothing to extract"):
        extract(tiny.randomize(Flux(tiny.FLUX), 3), tiny.randomize(Flux(tiny.FLUX), 3), 2)
    other = tiny.randomize(Flux(tiny.FLUX), 3)
    other.single_blocks = other.single_blocks[:-1]
    with pytest.raises(FluxError, match=r"differ in what they have: .*single_blocks"):
        extract(tiny.randomize(Flux(tiny.FLUX), 3), other, 2)


def test_a_sum_that_is_infinite_is_not_written(tmp_path):
    """Strengths that each can be written, beyond the type together; the file would be refused by all."""
    one = Adapter({PROJ: Delta(low_rank())})
    merged = merge([("a", one, 1e308), ("b", one, 1e308)])
    with pytest.raises(FluxError, match=r"a\.safetensors is not written: .* would be NaN or infinity"):
        save(tmp_path / "a.safetensors", merged, "native")
    assert not list(tmp_path.iterdir())
