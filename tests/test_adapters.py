"""Adapters beside the weights, in the weights, and in training, on the real transformer at tiny size."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.adapters import (
    Adapter,
    Adapters,
    Delta,
    Dense,
    Kronecker,
    LowRank,
    draw_dropout,
    load,
    mismatches,
    new_adapter,
    save,
    targets,
)
from flux.adapters.beside import AdaptedLinear, Dropout, dense_weight
from flux.adapters.changes import row_norms
from flux.adapters.lora import linears
from flux.errors import FluxError
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.weights.quantize import quantize

from . import tiny

HIDDEN = tiny.FLUX.hidden_size
QKV, LINEAR1, IMG_IN = "double_blocks.1.img_attn.qkv", "single_blocks.0.linear1", "img_in"
QUERY_NORM = "double_blocks.0.txt_attn.norm.query_norm.scale"


def make_model(bits: int | None = None) -> Flux:
    model = tiny.randomize(Flux(tiny.FLUX), 3)
    return quantize(model, bits, 32) if bits else model


def call(model: Flux) -> mx.array:
    rng = np.random.default_rng(0)
    shapes = (1, 6, tiny.FLUX.in_channels), (1, 4, tiny.FLUX.context_in_dim), (1, tiny.FLUX.vec_in_dim)
    img, txt, y = (mx.array(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    ids = mx.array([[[0, i // 3, i % 3] for i in range(6)]])
    return model(img, ids, txt, mx.zeros((1, 4, 3)), mx.array([0.5]), y, mx.array([3.0]))


def answer(model: Flux) -> np.ndarray:
    return np.array(call(model).astype(mx.float32))


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)) / 4


def lora_of(model: nn.Module, names: list[str], seed: int = 0, **more: mx.array) -> Adapter:
    modules = {}
    for i, name in enumerate(names):
        rows, columns = dense_weight(linears(model)[name]).shape
        down, up = normal(3, columns, seed=seed + i), normal(rows, 3, seed=seed + i + 100)
        modules[name] = Delta(LowRank(down, up, 2.0))
    return Adapter(modules, **more)


def every_kind(model: nn.Module) -> Adapter:
    """LoRA, LoRA with a bias, DoRA, LoKr, a dense change, a bias alone, norms."""
    adapter = lora_of(model, [QKV, LINEAR1, "single_blocks.1.linear2", "txt_in"])
    modules = adapter.modules
    modules["txt_in"] = Delta(modules["txt_in"].change, normal(HIDDEN))
    magnitude = mx.abs(normal(7 * HIDDEN)) + 1
    magnitude[HIDDEN : 2 * HIDDEN] = float("nan")  # these rows are no DoRA
    modules[LINEAR1] = Delta(modules[LINEAR1].change, magnitude=magnitude)
    modules["double_blocks.0.img_mlp.0"] = Delta(Kronecker(normal(4, 8), normal(HIDDEN, HIDDEN // 8), 0.7))
    modules["double_blocks.0.img_attn.proj"] = Delta(Dense(normal(HIDDEN, HIDDEN)))
    modules["double_blocks.1.txt_mlp.2"] = Delta(bias=normal(HIDDEN))
    replaced, added = {QUERY_NORM: 1 + normal(32)}, {"single_blocks.1.norm.key_norm.scale": normal(32)}
    return Adapter(modules, replaced, added)


def with_weights(adapter: Adapter, strength: float) -> Flux:
    """The model with an adapter worked into its weights by the formulas, without the code under test.

    A DoRA is weighed as PEFT does it: m (W + s dW) / norms of (W + s dW).
    """
    model = make_model()
    weights = tiny.parameters(model)
    for name, delta in adapter.modules.items():
        weight = np.array(weights[f"{name}.weight"])
        new = weight + (0 if delta.change is None else strength * np.array(delta.change.dense()))
        if delta.magnitude is not None:
            scaled = np.array(delta.magnitude)[:, None] * new / np.linalg.norm(new, axis=1, keepdims=True)
            new = np.where(np.isnan(scaled), new, scaled)
        weights[f"{name}.weight"] = mx.array(new)
        if delta.bias is not None:
            weights[f"{name}.bias"] += strength * delta.bias
    for name, value in adapter.replaced.items():
        weights[name] += strength * (value - weights[name])
    for name, value in adapter.added.items():
        weights[name] += strength * value
    model.load_weights(list(weights.items()))
    return model


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
def test_beside_and_fused_follow_the_formulas(strength: float):
    model = make_model()
    adapter = every_kind(model)
    expected = answer(with_weights(adapter, strength))
    base = answer(model)
    adapters = Adapters(model)
    assert adapters.add(adapter, strength) == {}
    assert error(answer(model), expected) <= 1e-5
    assert error(base, expected) > 1e-2
    assert adapters.fuse() == []
    assert error(answer(model), expected) <= 1e-5
    assert not any(isinstance(layer, AdaptedLinear) for layer in linears(model).values())
    assert adapters.strengths == {}


def test_strength_zero_and_removal_give_the_base_to_the_bit():
    model = make_model()
    untouched = make_model()
    base = answer(model)
    adapters = Adapters(model)
    adapters.add(every_kind(model), name="a")
    with_adapter = answer(model)
    adapters.set_strength("a", 0.0)
    assert np.array_equal(answer(model), base)
    adapters.set_strength("a", 1.0)
    assert np.array_equal(answer(model), with_adapter)
    adapters.remove("a")
    assert tiny.same(model, untouched)
    assert np.array_equal(answer(model), base)


def test_a_second_adapter_does_not_overwrite_the_first():
    """Both change the same layers and the same norm; their shares add up."""
    model = make_model()
    names = [QKV, LINEAR1]
    first = lora_of(model, names, 1, replaced={QUERY_NORM: 1 + normal(32, seed=1)})
    second = lora_of(model, names, 2, replaced={QUERY_NORM: 1 + normal(32, seed=2)})
    adapters = Adapters(model)
    adapters.add(first, 0.8, "first")
    only_first = answer(model)
    adapters.add(second, 0.6, "second")
    assert linears(model)[QKV].shares[0].name == "first"
    weights = tiny.parameters(make_model())
    for name in names:
        delta = 0.8 * first.modules[name].change.dense() + 0.6 * second.modules[name].change.dense()
        weights[f"{name}.weight"] += delta
    norm = weights[QUERY_NORM]
    weights[QUERY_NORM] = (
        norm + 0.8 * (first.replaced[QUERY_NORM] - norm) + 0.6 * (second.replaced[QUERY_NORM] - norm)
    )
    expected = make_model()
    expected.load_weights(list(weights.items()))
    both = answer(model)
    assert error(both, answer(expected)) <= 1e-5
    adapters.remove("second")
    assert error(answer(model), only_first) <= 1e-6
    adapters.add(second, 0.6)
    assert adapters.strengths == {"first": 0.8, "adapter 2": 0.6}
    adapters.fuse()
    assert error(answer(model), both) <= 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_keep_adapters_beside(bits: int):
    """Worked into weights of few bits a LoRA would be rounded away; the answer must not change by `fuse`."""
    model = make_model(bits)
    base = answer(model)
    adapter = every_kind(model)
    adapters = Adapters(model)
    adapters.add(adapter, 0.5, "a")
    expected = answer(model)
    before = {name: mx.array(layer.base.weight) for name, layer in linears(model).items() if "base" in layer}
    kept = adapters.fuse()
    assert set(kept) == {name for name in adapter.modules if name.startswith(("double", "single"))}
    assert all(mx.array_equal(linears(model)[name].base.weight, before[name]) for name in kept)
    assert error(answer(model), expected) <= 1e-5
    adapters.set_strength("a", 0.0)
    assert error(answer(model), expected) > 1e-2
    assert error(expected, base) > 1e-2


def test_dora_on_quantized_weights_takes_the_norms_of_what_they_stand_for():
    model = make_model(8)
    layer = linears(model)[LINEAR1]
    adapter = Adapter({LINEAR1: every_kind(model).modules[LINEAR1]})
    x = normal(2, HIDDEN)
    weight = np.array(dense_weight(layer))
    new = weight + np.array(adapter.modules[LINEAR1].change.dense())
    magnitude = np.array(adapter.modules[LINEAR1].magnitude)[:, None]
    scaled = np.where(np.isnan(magnitude), new, magnitude * new / np.linalg.norm(new, axis=1, keepdims=True))
    Adapters(model).add(adapter)
    expected = np.array(x) @ scaled.T + np.array(layer.bias)
    assert error(np.array(linears(model)[LINEAR1](x)), expected) <= 1e-5


def test_types_follow_the_network():
    """A float32 adapter beside 16-bit weights neither widens the activations nor is rounded when fused."""
    model = make_model()
    model.set_dtype(mx.bfloat16)
    adapters = Adapters(model)
    adapters.add(every_kind(model))
    assert linears(model)[QKV](normal(2, HIDDEN).astype(mx.bfloat16)).dtype == mx.bfloat16
    assert call(model).dtype == mx.bfloat16
    weight, change = linears(model)[QKV].base.weight, every_kind(model).modules[QKV].change.dense()
    adapters.fuse()
    assert all(w.dtype == mx.bfloat16 for w in tiny.parameters(model).values())
    expected = (weight.astype(mx.float32) + change).astype(mx.bfloat16)
    assert mx.array_equal(linears(model)[QKV].weight, expected)


# --- What does not fit ---


def test_misfits_are_named():
    model = make_model()
    adapter = lora_of(model, [QKV, "txt_in"])
    adapter.modules["double_blocks.7.img_attn.qkv"] = adapter.modules[QKV]
    adapter.modules[LINEAR1] = adapter.modules[QKV]
    adapter.replaced["double_blocks.9.img_attn.norm.query_norm.scale"] = normal(32)
    adapter.replaced[QUERY_NORM] = normal(5)
    wrong = mismatches(model, adapter)
    assert wrong["double_blocks.7.img_attn.qkv"] == "the model has no such layer"
    assert (
        wrong[LINEAR1]
        == f"the adapter is for {HIDDEN} -> {3 * HIDDEN}, the layer is {HIDDEN} -> {7 * HIDDEN}"
    )
    assert len(wrong) == 4
    adapters = Adapters(model)
    with pytest.raises(FluxError, match=r"4 of .* do not fit: double_blocks\.7"):
        adapters.add(adapter, strict=True)
    assert tiny.same(model, make_model())
    assert adapters.add(adapter, name="a") == wrong
    assert error(answer(model), answer(make_model())) > 1e-2
    adapters.set_strength("a", 0.0)
    assert np.array_equal(answer(model), answer(make_model()))


def test_nothing_fits():
    adapter = lora_of(make_model(), [QKV])
    other = Adapter({"single_blocks.99.linear1": adapter.modules[QKV]})
    with pytest.raises(FluxError, match=r"my lora: 1 of 1 layers do not fit: single_blocks\.99"):
        Adapters(make_model()).add(other, name="my lora")


def test_names_of_adapters():
    adapters = Adapters(make_model())
    adapters.add(lora_of(adapters.model, [QKV]), name="a")
    with pytest.raises(FluxError, match="already has an adapter named 'a'"):
        adapters.add(lora_of(adapters.model, [QKV]), name="a")
    with pytest.raises(FluxError, match="no adapter named 'b': it has a"):
        adapters.remove("b")


def test_control_adapter_widens_on_request():
    model = make_model()
    channels = tiny.FLUX.in_channels
    wide = Adapter({IMG_IN: Delta(LowRank(normal(3, 2 * channels), normal(HIDDEN, 3), 3.0))})
    adapters = Adapters(model)
    with pytest.raises(FluxError, match="structure picture"):
        adapters.add(wide)
    base = answer(model)
    adapters.add(wide, name="control", widen=True)
    assert model.img_in.base.weight.shape == (HIDDEN, 2 * channels)
    x = normal(5, 2 * channels)
    old = tiny.parameters(make_model())
    weight = mx.pad(old["img_in.weight"], [(0, 0), (0, channels)]) + wide.modules[IMG_IN].change.dense()
    assert error(np.array(model.img_in(x)), np.array(x @ weight.T + old["img_in.bias"])) <= 1e-5
    adapters.add(wide, name="another")
    adapters.remove("control")
    assert error(np.array(model.img_in(x)), np.array(x @ weight.T + old["img_in.bias"])) <= 1e-5
    adapters.remove("another")
    assert tiny.same(model, make_model())
    assert np.array_equal(answer(model), base)


@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_a_narrower_adapter_of_img_in_changes_the_first_channels(kind):
    """A dev's on a model that is given a picture: the noise's channels come first.

    Not a DoRA, whose norms are those of a whole row.
    """
    model = make_model()
    channels = tiny.FLUX.in_channels
    model.img_in = nn.Linear(2 * channels, HIDDEN)
    change = LowRank(normal(3, channels), normal(HIDDEN, 3), 3.0)
    change = change if kind == "low rank" else Dense(change.dense())
    x = normal(5, 2 * channels)
    wanted = model.img_in(x) + x[:, :channels] @ change.dense().T
    adapters = Adapters(model)
    assert adapters.add(Adapter({IMG_IN: Delta(change)}), strict=True) == {}
    assert error(np.array(model.img_in(x)), np.array(wanted)) <= 1e-5
    adapters.fuse()
    assert error(np.array(model.img_in(x)), np.array(wanted)) <= 1e-5
    with pytest.raises(FluxError, match="the adapter is for 16 -> 64, the layer is 32 -> 64"):
        adapters.add(Adapter({IMG_IN: Delta(change, magnitude=normal(HIDDEN))}))


def test_a_packed_img_in_is_widened_by_zeros():
    model = make_model()
    model.img_in = nn.Linear(64, HIDDEN)
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: path == IMG_IN)
    before = {name: model.img_in[name] for name in ("weight", "scales", "biases")}
    x = normal(5, 128)
    plain = model.img_in(x[:, :64])
    change = LowRank(normal(3, 128), normal(HIDDEN, 3), 3.0)
    adapters = Adapters(model)
    adapters.add(Adapter({IMG_IN: Delta(change)}), name="control", widen=True, strict=True)
    assert error(np.array(model.img_in(x)), np.array(plain + x @ change.dense().T)) <= 1e-5
    adapters.remove("control")
    assert all(model.img_in[name] is array for name, array in before.items())


# --- Training ---


def test_targets():
    model = make_model()
    default = targets(model)
    depth, single = tiny.FLUX.depth, tiny.FLUX.depth_single_blocks
    assert len(default) == 8 * depth + 2 * single
    assert not any("mod" in name for name in default)
    assert len(targets(model, "attention")) == 4 * depth + 2 * single
    assert len(targets(model, "blocks")) == 10 * depth + 3 * single
    assert set(targets(model, "all")) == set(linears(model))
    assert targets(model, r".*img_attn\.qkv") == [f"double_blocks.{i}.img_attn.qkv" for i in range(depth)]
    last = targets(model, last_blocks=single + 1)
    assert {name.split(".")[:2][0] + name.split(".")[1] for name in last} == {
        f"double_blocks{depth - 1}",
        *(f"single_blocks{i}" for i in range(single)),
    }
    assert len(targets(CLIPTextModel(tiny.CLIP))) == 6 * tiny.CLIP.num_hidden_layers
    assert len(targets(T5Encoder(tiny.T5))) == 7 * tiny.T5.num_layers
    assert len(targets(T5Encoder(tiny.T5), last_blocks=1)) == 7


@pytest.mark.parametrize(
    ("which", "last", "words"),
    [
        ("[", None, r"no layer has such a name, and it is not a pattern \(unterminated.*nearest names: "),
        ("no_such", None, "no layer has such a name"),
        ("all", 0, "give 1 or more"),
    ],
)
def test_bad_targets(which: str, last: int | None, words: str):
    with pytest.raises(FluxError, match=words):
        targets(make_model(), which, last)


def train_ready(bits: int | None = None, **options) -> tuple[Flux, Adapters]:
    model = make_model(bits)
    adapters = Adapters(model)
    dropout = options.pop("dropout", 0.0)
    adapter = new_adapter(model, targets(model), 4, 8.0, mx.random.key(1), **options)
    adapters.add(adapter, name="new", dropout=dropout, trainable=True)
    adapters.freeze_all_but("new")
    return model, adapters


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(dora: bool):
    model, adapters = train_ready(dora=dora)
    assert error(answer(model), answer(make_model())) <= (1e-5 if dora else 0)
    change = adapters.extract("new").modules[QKV].change
    assert change.down.shape == (4, HIDDEN)
    assert change.alpha == 8.0
    bound = HIDDEN**-0.5
    assert 0.9 * bound < mx.max(mx.abs(change.down)).item() <= bound
    assert not mx.any(change.up).item()
    downs = [delta.change.down for delta in adapters.extract("new").modules.values()]
    assert not mx.array_equal(downs[0], downs[2])


def test_rank_below_one():
    with pytest.raises(FluxError, match="rank 0"):
        new_adapter(make_model(), [QKV], 0, 1.0, mx.random.key(0))


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_trainable(dora: bool):
    model, _ = train_ready(dora=dora)
    names = dict(tree_flatten(model.trainable_parameters()))
    assert {name.rsplit(".", 1)[1] for name in names} == {"down", "up"} | ({"magnitude"} if dora else set())
    assert {name.split(".shares.")[0] for name in names} == set(targets(model))
    assert len(names) == (3 if dora else 2) * len(targets(model))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_learns(bits: int | None, dora: bool):
    """One layer learns to answer as another one whose weight differs by a matrix of rank 1."""
    model = nn.Sequential(nn.Linear(32, 24))
    base = dense_weight(model.layers[0])
    if bits:
        nn.quantize(model, 32, bits)
    adapters = Adapters(model)
    adapters.add(new_adapter(model, ["layers.0"], 4, 8.0, mx.random.key(1), dora), name="new", trainable=True)
    adapters.freeze_all_but("new")
    before = {name: mx.array(w) for name, w in tiny.parameters(model).items()}
    x = normal(64, 32)
    goal = x @ (base + 4 * normal(24, 1) @ normal(1, 32, seed=1)).T
    loss = nn.value_and_grad(model, lambda m: mx.mean((m(x) - goal) ** 2))
    optimizer, losses = optim.Adam(0.02), []
    for _ in range(60):
        value, gradients = loss(model)
        optimizer.update(model, gradients)
        losses.append(value.item())
    assert losses[-1] < 0.25 * losses[0]
    changed = {name for name, w in tiny.parameters(model).items() if not mx.array_equal(w, before[name])}
    assert changed == set(dict(tree_flatten(model.trainable_parameters())))


def test_dropout_works_in_training_alone():
    model, adapters = train_ready(dropout=0.5)
    for _, share in adapters._layers_of("new"):
        share.layer.up = normal(*share.layer.up.shape)
    model.train()
    answers = []
    for seed in (1, 1, 2):
        draw_dropout(model, mx.random.key(seed))
        answers.append(answer(model))
    assert np.array_equal(answers[0], answers[1])
    assert error(answers[2], answers[0]) > 1e-3
    model.eval()
    assert np.array_equal(answer(model), answer(model))


def test_trained_adapter_goes_out_and_comes_back(tmp_path):
    """Trained beside the weights, saved, loaded into a fresh model: the same answer to the bit."""
    model, adapters = train_ready()
    for i, (_, share) in enumerate(adapters._layers_of("new")):
        share.layer.up = normal(*share.layer.up.shape, seed=i)
    save(tmp_path / "a.safetensors", adapters.extract("new"), "native", {"trigger": "sks dog"})
    fresh = make_model()
    assert Adapters(fresh).add(load(tmp_path / "a.safetensors", strict=True)) == {}
    assert np.array_equal(answer(fresh), answer(model))


def test_compiled_calls_work():
    """Also with a DoRA, whose norms must not be made inside of the compiled function."""
    model = make_model()
    Adapters(model).add(every_kind(model))
    x = normal(2, HIDDEN)
    for name in (QKV, LINEAR1):
        layer = linears(model)[name]
        compiled = mx.compile(lambda x, layer=layer: layer(x))(x)
        assert error(np.array(compiled), np.array(layer(x))) <= 1e-5


def test_row_norms_and_text_encoders():
    assert row_norms(mx.array([[3.0, 4.0], [0.0, 2.0]])).tolist() == [5.0, 2.0]
    for model in (tiny.randomize(CLIPTextModel(tiny.CLIP), 1), tiny.randomize(T5Encoder(tiny.T5), 2)):
        names = targets(model)
        both = Adapter({**lora_of(model, names).modules, IMG_IN: Delta(bias=normal(4))})
        part = "clip" if "self_attn" in names[0] or "mlp" in names[0] else "t5"
        assert both.parts() == ["flux", part]
        assert Adapters(model).add(both.part(part)) == {}
        assert sum(isinstance(layer, AdaptedLinear) for layer in linears(model).values()) == len(names)


def test_dropout_keeps_the_mean():
    """What is kept is scaled up by 1 / (1 - p), so that a layer's answer is the same on average."""
    layer = Dropout(0.25)
    draw_dropout(layer, mx.random.key(3))
    x = normal(200, 100)
    dropped = np.array(layer(x))
    kept = dropped != 0
    assert kept.mean() == pytest.approx(0.75, abs=0.02)
    assert np.allclose(dropped[kept], np.array(x)[kept] / 0.75, rtol=1e-6)
    layer.eval()
    assert mx.array_equal(layer(x), x)
