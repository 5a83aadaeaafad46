"""Kinds of adapters in files made by hand, by own formulas in numpy: what becomes of a weight, and of W x."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux.adapters import Adapter, Adapters, Delta, load
from flux.adapters.beside import AdaptedLinear, AdapterLayer, Base
from flux.adapters.changes import (
    Change,
    GLoRA,
    Hadamard,
    LowRank,
    Replacement,
    Rotation,
    Scaling,
    Stack,
)
from flux.errors import FluxError

from .adapter_files import HIDDEN, MLP, lora, normal, pair, read_numpy

QKV, PROJ, LINEAR1 = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_attn.proj",
    "single_blocks.2.linear1",
)
SHAPES = {QKV: (3 * HIDDEN, HIDDEN), PROJ: (HIDDEN, HIDDEN), LINEAR1: (3 * HIDDEN + MLP, HIDDEN)}
PARTS = {
    QKV: [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    PROJ: ["transformer_blocks.0.attn.to_out.0"],
    LINEAR1: [
        f"single_transformer_blocks.2.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
}


def weight_of(module: str) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(SHAPES[module], dtype=np.float32) / 3


def rows_of(module: str, split: bool) -> list[tuple[str, int, int]]:
    """(stem in a file, first row, end) of each part."""
    rows = SHAPES[module][0]
    if not split:
        return [("lycoris_" + module.replace(".", "_"), 0, rows)]
    edges = [HIDDEN * i for i in range(len(PARTS[module]))] + [rows]
    names = ["lycoris_" + name.replace(".", "_") for name in PARTS[module]]
    return list(zip(names, edges, edges[1:], strict=False))


def changed(delta: Delta, weight: np.ndarray, strength: float = 1.0) -> np.ndarray:
    return weight + np.array(delta.delta(mx.array(weight), strength))


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(make, module: str, split: bool, strengths: tuple[float, ...] = (1.0,)) -> Adapter:
    """make(stem, W of the part) -> (tensors, strength -> W'). In the weight and beside it."""
    weight = weight_of(module)
    tensors, new = {}, {s: weight.copy() for s in strengths}
    for stem, start, end in rows_of(module, split):
        own, formula = make(stem, weight[start:end])
        tensors |= own
        for strength in strengths:
            new[strength][start:end] = formula(strength)
    adapter = read_numpy(tensors)
    assert adapter.unexpected == []
    delta = adapter.modules[module]
    x = normal(5, HIDDEN)
    layer = nn.Linear(*weight.shape[::-1])
    layer.weight, layer.bias = mx.array(weight), mx.array(normal(weight.shape[0]))
    adapted = AdaptedLinear(layer)
    adapted.shares = [AdapterLayer("", delta.settled(layer.bias), 1.0)]
    for strength in strengths:
        adapted.shares[0].weigh(strength, Base(layer))
        assert error(changed(delta, weight, strength), new[strength]) <= 2e-6
        expected = x @ new[strength].T + np.array(layer.bias)
        assert error(np.array(adapted(mx.array(x))), expected) <= 5e-6
        assert error(np.array(mx.compile(lambda x: adapted(x))(mx.array(x))), expected) <= 5e-6
        assert error(weight, new[strength]) > 1e-2 * abs(strength)
    return adapter


cases = pytest.mark.parametrize("module", SHAPES)
fused_or_split = pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])


@cases
@fused_or_split
@pytest.mark.parametrize("alpha", [None, 0.5, 6.0])
def test_loha(module: str, split: bool, alpha: float | None):
    def make(stem, weight):
        (b1, a1), (b2, a2) = pair(*weight.shape, 3), pair(*weight.shape, 3)
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        tensors = {f"{stem}.{name}": t for name, t in zip(names, (a1, b1, a2, b2), strict=True)}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
        scale = 1 if alpha is None else alpha / 3
        return tensors, lambda s: weight + s * scale * (a1 @ b1) * (a2 @ b2)

    adapter = check(make, module, split, (1.0, 0.4))
    assert adapter.format == "LoHa"


def test_loha_with_cores():
    """Tucker's decomposition: w = t x (a^T, b), as LyCORIS writes it for convolutions."""

    def make(stem, weight):
        rows, columns = weight.shape
        a, b, t = (
            [normal(3, rows) for _ in "ab"],
            [normal(3, columns) for _ in "ab"],
            [normal(3, 3) for _ in "ab"],
        )
        tensors = {f"{stem}.alpha": np.array(2.0, np.float32)}
        for i in (0, 1):
            own = {f"w{i + 1}_a": a[i], f"w{i + 1}_b": b[i], f"t{i + 1}": t[i][:, :, None, None]}
            tensors |= {f"{stem}.hada_{name}": value for name, value in own.items()}
        w1, w2 = (np.einsum("ij,jr,ip->pr", t[i], b[i], a[i]) for i in (0, 1))
        return tensors, lambda s: weight + s * 2 / 3 * w1 * w2

    check(make, PROJ, False)


@cases
@fused_or_split
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_glora(module: str, split: bool, old: bool):
    """LyCORIS before 2.0 named the factors in the other order."""

    def make(stem, weight):
        (a2, a1), (b2, b1) = pair(HIDDEN, HIDDEN, 3), pair(*weight.shape, 3)
        names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
        tensors = {f"{stem}.{name}.weight": t / 3 for name, t in zip(names, (a1, a2, b1, b2), strict=True)}
        tensors[f"{stem}.alpha"] = np.array(2.0, np.float32)
        return tensors, lambda s: weight + s * 2 / 3 / 9 * (weight @ a1 @ a2 + b1 @ b2)

    check(make, module, split, (1.0, -0.5))


@cases
@fused_or_split
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(module: str, split: bool, on_input: bool):
    def make(stem, weight):
        factor = normal(weight.shape[1] if on_input else weight.shape[0])
        tensors = {f"{stem}.weight": factor, f"{stem}.on_input": np.array(on_input)}
        return tensors, lambda s: weight * (1 + s * (factor if on_input else factor[:, None]))

    check(make, module, split, (1.0, 0.5))


def rotations(blocks: np.ndarray, limit: float = 0.0) -> np.ndarray:
    q = blocks - blocks.swapaxes(-1, -2)
    norm = np.linalg.norm(q)
    if 0 < limit < norm:
        q = q * limit / norm
    eye = np.eye(q.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    size = blocks.shape[-1]
    out = np.zeros((len(blocks) * size,) * 2)
    for i, block in enumerate(blocks):
        out[size * i : size * (i + 1), size * i : size * (i + 1)] = block
    return out


@cases
@fused_or_split
@pytest.mark.parametrize("limit", [0.0, 1e-2])
@pytest.mark.parametrize("rescale", [False, True])
def test_oft(module: str, split: bool, limit: float, rescale: bool):
    """Alpha is the constraint of Q's norm for each row; LyCORIS and sd-scripts turn rows by R^T."""

    def make(stem, weight):
        blocks = normal(weight.shape[0] // 4, 4, 4) / 5
        scale = 1 + normal(weight.shape[0], 1) / 5 if rescale else np.ones((1, 1))
        turned = block_diagonal(rotations(blocks, limit * weight.shape[0])).T
        tensors = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": np.array(limit, np.float32)}
        tensors |= {f"{stem}.rescale": scale.astype(np.float32)} if rescale else {}
        eye = np.eye(len(turned))
        return tensors, lambda s: (1 + s * (scale - 1)) * ((eye + s * (turned - eye)) @ weight)

    check(make, module, split, (1.0, 0.5))


def test_oft_of_sd_scripts():
    """A fused layer's parts have blocks of their own sizes."""
    weight = weight_of(LINEAR1)
    stem, sizes = "oft_unet_single_blocks_2_linear1", [HIDDEN, HIDDEN, HIDDEN, MLP]
    blocks = [normal(2, size // 2, size // 2) / 5 for size in sizes]
    tensors = {f"{stem}.oft_blocks.{i}": own for i, own in enumerate(blocks)}
    adapter = read_numpy({**tensors, f"{stem}.alpha": np.array(0.05, np.float32)})
    parts = np.split(weight, np.cumsum(sizes)[:-1])
    turned = [
        block_diagonal(rotations(b, 0.05 * n)).T @ w for b, n, w in zip(blocks, sizes, parts, strict=True)
    ]
    assert error(changed(adapter.modules[LINEAR1], weight), np.concatenate(turned)) <= 2e-6


def test_oft_of_old_lycoris():
    """`oft_diag` holds the rotations themselves."""
    weight, blocks = weight_of(PROJ), rotations(normal(2, 4, 4)).astype(np.float32)
    adapter = read_numpy({"lycoris_double_blocks_0_img_attn_proj.oft_diag": blocks})
    assert error(changed(adapter.modules[PROJ], weight), block_diagonal(blocks).T @ weight) <= 2e-6


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te3_encoder_block_1_layer_0_SelfAttention_q", "encoder.block.1.layer.0.SelfAttention.q"),
        ("lora_te2_encoder_block_1_layer_0_SelfAttention_q", "encoder.block.1.layer.0.SelfAttention.q"),
    ],
    ids=["CLIP", "T5", "T5 of OneTrainer"],
)
def test_text_encoders(stem: str, module: str):
    weight, (down, up) = normal(6, 4), pair(6, 4)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    loha = {f"{stem}.{name}": t for name, t in zip(names, (up, down, up, down), strict=True)}
    delta = read_numpy(loha).modules[module]
    assert error(changed(delta, weight), weight + (up @ down) ** 2) <= 2e-6
    dora = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.dora_scale": normal(1, 4),
    }
    new = weight + up @ down
    expected = dora[f"{stem}.dora_scale"] * new / np.linalg.norm(new, axis=0)
    assert error(changed(read_numpy(dora).modules[module], weight), expected) <= 2e-6
    blocks = normal(2, 3, 3) / 3
    oft = read_numpy({f"{stem}.oft_blocks": blocks}).modules[module]
    assert error(changed(oft, weight), block_diagonal(rotations(blocks)).T @ weight) <= 2e-6


# --- DoRA ---


@cases
@fused_or_split
@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_dora_of_lycoris(module: str, split: bool, axis: int, kind: str):
    """W' = (1 + s (m / norms of (W + dW) - 1)) (W + dW), by the axis that the scale's shape tells."""

    def make(stem, weight):
        down, up = pair(*weight.shape, 2)
        if kind == "lora":
            tensors, change = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, up @ down
        elif kind == "loha":
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            tensors = {f"{stem}.{n}": t for n, t in zip(names, (up, down, up, down), strict=True)}
            change = (up @ down) ** 2
        else:
            w1, w2 = normal(2, 4), normal(weight.shape[0] // 2, 2)
            tensors, change = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}, np.kron(w1, w2)
        new = weight + change
        norms = np.linalg.norm(new, axis=axis, keepdims=True)
        magnitude = (norms * (1 + normal(*norms.shape) / 5)).astype(np.float32)
        tensors[f"{stem}.dora_scale"] = magnitude
        return tensors, lambda s: (1 + s * (magnitude / norms - 1)) * new

    check(make, module, split, (1.0, 0.5, -0.3))


@cases
@fused_or_split
def test_dora_of_peft(module: str, split: bool):
    """W' = m (W + s dW) / norms of (W + s dW)."""

    def make(stem, weight):
        down, up = pair(*weight.shape, 2)
        magnitude = np.abs(normal(weight.shape[0])) + 1
        tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        tensors[f"{stem}.lora_magnitude_vector"] = magnitude

        def formula(s):
            new = weight + s * up @ down
            return magnitude[:, None] * new / np.linalg.norm(new, axis=1, keepdims=True)

        return tensors, formula

    check(make, module, split, (1.0, 0.5, -0.3))


def test_a_dora_of_strength_zero_is_off():
    weight = weight_of(PROJ)
    for name in ("dora_scale", "lora_magnitude_vector"):
        tensors = lora(PROJ) | {f"{PROJ}.{name}": normal(HIDDEN, 1)}
        assert np.array_equal(changed(read_numpy(tensors).modules[PROJ], weight, 0.0), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_dora_scales(value: float):
    tensors = lora(PROJ) | {f"{PROJ}.dora_scale": np.full((HIDDEN, 1), value, np.float32)}
    with pytest.raises(FluxError, match=r"attn\.proj: a DoRA scale that is NaN or infinite"):
        read_numpy(tensors)


def test_lycoris_dora_on_some_parts():
    stem = "transformer.transformer_blocks.0.attn.to_"
    tensors = lora(stem + "q") | lora(stem + "v") | {stem + "v.dora_scale": np.abs(normal(HIDDEN, 1))}
    delta, weight = read_numpy(tensors).modules[QKV], weight_of(QKV)
    assert isinstance(delta.change, Stack)
    half = tensors[stem + "q.lora_B.weight"] @ tensors[stem + "q.lora_A.weight"] / 2
    assert error(changed(delta, weight, 0.5)[:HIDDEN], weight[:HIDDEN] + half) <= 1e-6


# --- Whole layers, biases, norms ---


def test_whole_layers_and_biases():
    """PEFT's modules_to_save and bias="lora_only": in place of what the base has."""
    model = nn.Module()
    model.img_in, model.txt_in = nn.Linear(4, HIDDEN), nn.Linear(6, HIDDEN)
    new, bias, other = normal(HIDDEN, 4), normal(HIDDEN), normal(HIDDEN)
    down, up = pair(HIDDEN, 6)
    tensors = {
        "base_model.model.x_embedder.modules_to_save.default.weight": new,
        "base_model.model.x_embedder.modules_to_save.default.bias": bias,
        "base_model.model.context_embedder.base_layer.bias": other,
        "base_model.model.context_embedder.lora_A.default.weight": down,
        "base_model.model.context_embedder.lora_B.default.weight": up,
    }
    adapter = read_numpy(tensors, config={"bias": "lora_only", "lora_alpha": 3, "r": 3})
    assert adapter.unexpected == []
    x, y = normal(2, 4), normal(2, 6)
    old = np.array(model.txt_in.weight)
    adapters = Adapters(model)
    adapters.add(adapter, name="a")
    for _ in range(2):
        assert error(np.array(model.img_in(mx.array(x))), x @ new.T + bias) <= 1e-5
        assert error(np.array(model.txt_in(mx.array(y))), y @ (old + up @ down).T + other) <= 1e-5
        adapters.fuse()


def test_a_model_is_no_adapter():
    tensors = {"img_in.weight": normal(HIDDEN, 4), "img_in.bias": normal(HIDDEN)}
    with pytest.raises(FluxError, match="holds no adapter"):
        read_numpy(tensors)


def test_promised_biases_must_be_there():
    config = {"bias": "lora_only", "r": 3, "lora_alpha": 3}
    with pytest.raises(FluxError, match="biases were trained too"):
        read_numpy(lora("img_in"), config=config)


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_adapters_of_changed_bases_are_refused(way: str):
    config = {"transformer.init_lora_weights": way}
    with pytest.raises(FluxError, match=f"'{way}'.*changed base weights"):
        read_numpy(lora("transformer.x_embedder"), {"lora_adapter_metadata": json.dumps(config)})


def test_norms_of_lycoris():
    clip = "lora_te1_text_model_encoder_layers_0_layer_norm1"
    tensors = lora("img_in") | {
        "lycoris_transformer_blocks_0_attn_norm_q.w_norm": normal(4),
        f"{clip}.w_norm": normal(6),
        f"{clip}.b_norm": normal(6),
        "lora_te3_encoder_block_1_layer_0_layer_norm.w_norm": normal(6),
    }
    adapter = read_numpy(tensors)
    assert adapter.unexpected == []
    assert set(adapter.added) == {
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "text_model.encoder.layers.0.layer_norm1.weight",
        "text_model.encoder.layers.0.layer_norm1.bias",
        "encoder.block.1.layer.0.layer_norm.weight",
    }
    assert adapter.parts() == ["flux", "clip", "t5"]


# --- Names ---


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("transformer.x_embedder.lora_A.default_0.weight", "transformer.x_embedder.lora_B.default_0.weight"),
        (
            "base_model.model.x_embedder.lora_A.my-style.weight",
            "base_model.model.x_embedder.lora_B.my-style.weight",
        ),
        ("unet.img_in.lora_A.weight", "unet.img_in.lora_B.weight"),
        ("model.img_in.lora_down.weight", "model.img_in.lora_up.weight"),
        ("lora_unet_img_in_.lora_down.weight", "lora_unet_img_in_.lora_up.weight"),
        ("module._orig_mod.img_in.lora_A.weight", "module._orig_mod.img_in.lora_B.weight"),
    ],
)
def test_names(down: str, up: str):
    a, b = pair(HIDDEN, 4)
    adapter = read_numpy({down: a, up: b})
    assert adapter.unexpected == []
    assert error(np.array(adapter.modules["img_in"].change.dense()), b @ a) <= 1e-6


def test_bundled_embeddings_are_named_as_left_out():
    tensors = lora("img_in") | {"bundle_emb.<sks>.clip_l": normal(2, 8), "bundle_emb.<sks>.t5": normal(2, 8)}
    unexpected = read_numpy(tensors).unexpected
    assert len(unexpected) == 2
    assert all("an embedding for a word, which is not used" in line for line in unexpected)


# --- Other models ---

FOREIGN = {
    "Stable Diffusion XL": [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_te2_text_model_x",
    ],
    "Stable Diffusion 1 or 2": ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"],
    "Stable Diffusion 3": ["lora_unet_joint_blocks_0_x_block_attn_qkv"],
    "FLUX.2": ["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "Chroma": ["lora_unet_distilled_guidance_layer_in_proj"],
    "Qwen-Image": ["transformer.transformer_blocks.0.img_mlp.net.0.proj"],
    "Wan": ["diffusion_model.blocks.0.self_attn.q"],
    "HunyuanVideo": ["transformer.double_blocks.0.img_mlp.fc1"],
    "HiDream": ["diffusion_model.double_stream_blocks.0.block.attn1.to_q"],
    "Z-Image": ["diffusion_model.layers.0.attention.to_q"],
}
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"  # would fit FLUX.1's CLIP


@pytest.mark.parametrize("model", FOREIGN)
def test_adapters_for_other_models_by_their_names(model: str):
    tensors = lora(TEXT)
    for stem in FOREIGN[model]:
        tensors |= lora(stem)
    with pytest.raises(FluxError, match=f"an adapter for {model}"):
        read_numpy(tensors)


def test_stable_diffusion_3_by_its_blocks():
    with pytest.raises(FluxError, match="an adapter for Stable Diffusion 3"):
        read_numpy(lora("transformer.transformer_blocks.19.attn.to_out.0"))


@pytest.mark.parametrize("stem", ["lora_unet_mid_block_attentions_0_proj_in", "lora_te2_text_model_x"])
def test_a_key_of_another_model_among_flux(stem: str):
    """One key that is unknown does not make all the others those of another model."""
    assert len(read_numpy(lora(stem) | lora(PROJ)).unexpected) == 2


def test_flux2_by_its_shapes():
    tensors = lora("diffusion_model.single_blocks.0.linear1", 9 * HIDDEN, HIDDEN)
    with pytest.raises(FluxError, match=r"an adapter for FLUX\.2"):
        read_numpy(tensors)


@pytest.mark.parametrize(
    ("metadata", "model"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1 or 2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "chroma"}, "Chroma"),
        ({"modelspec.architecture": "flux-2-dev/lora"}, "FLUX.2"),
        ({"ss_base_model_version": "wan2.1"}, "Wan"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, None),
        ({"ss_base_model_version": "flux1"}, None),
        ({"title": "sdxl style, now for flux"}, None),
    ],
)
def test_adapters_for_other_models_by_the_header(metadata: dict, model: str | None):
    if model is None:
        assert read_numpy(lora(TEXT), metadata).parts() == ["clip"]
    else:
        with pytest.raises(FluxError, match=f"an adapter for {model}"):
            read_numpy(lora(TEXT), metadata)


# --- Folders ---


def write(path: Path, stem: str = "img_in") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {name: mx.array(t) for name, t in lora(stem).items()})


@pytest.mark.parametrize(
    ("files", "last"),
    [
        (["dog.safetensors", "dog_000000500.safetensors", "dog_000001000.safetensors"], "dog"),  # ai-toolkit
        (["dog-000002.safetensors", "dog-000010.safetensors"], "dog-000010"),  # sd-scripts
        (["adapters-step00000100.safetensors", "adapters-step00000200.safetensors"], "adapters-step00000200"),
        (["adapters-step00000100.safetensors", "final_adapters.safetensors"], "final_adapters"),  # ours
        (["lora.safetensors"], "lora"),  # Replicate
        (["pytorch_lora_weights.safetensors", "other.safetensors"], "pytorch_lora_weights"),
        (
            [
                "checkpoint-500/pytorch_lora_weights.safetensors",
                "checkpoint-1000/pytorch_lora_weights.safetensors",
            ],
            "checkpoint-1000/pytorch_lora_weights",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_folders_of_trainers(files: list[str], last: str, tmp_path: Path):
    for name in files:
        write(tmp_path / name, "img_in" if name == f"{last}.safetensors" else "txt_in")
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), {"exp_avg": mx.zeros((2, 2))})
    (tmp_path / "broken.safetensors").write_text("no")
    assert list(load(tmp_path).modules) == ["img_in"]


def test_the_last_of_several_is_named(tmp_path: Path):
    for name in ("dog-000002", "dog"):
        write(tmp_path / f"{name}.safetensors")
    with pytest.warns(UserWarning, match=r"dog\.safetensors, the last of 2 adapters"):
        load(tmp_path)


def test_several_adapters_in_a_folder(tmp_path: Path):
    for name in ("dog", "cat"):
        write(tmp_path / f"{name}.safetensors")
    with pytest.raises(FluxError, match=r"several adapters; give one of them: cat\.safetensors, dog"):
        load(tmp_path)


# --- Types ---


def every_change() -> dict[str, Change]:
    factors = [mx.array(normal(*shape)) for shape in ((8, 2), (2, 8), (8, 2), (2, 8))]
    blocks = mx.array(normal(2, 2, 4, 4))
    low_rank = LowRank(mx.array(normal(2, 8)), mx.array(normal(4, 2)), 1.0)
    columns = Delta(low_rank, magnitude=mx.array(normal(1, 8)))
    return {
        "LoHa": Hadamard(*factors, 1.0),
        "GLoRA": GLoRA(*factors, 1.0),
        "rows": Scaling(mx.array(normal(8, 1))),
        "columns": Scaling(mx.array(normal(1, 8))),
        "OFT": Rotation(blocks[:1], rescale=mx.array(normal(8, 1))),
        "OFT of the input": Rotation(blocks[:1], inner=True),
        "BOFT": Rotation(blocks, butterfly=True),
        "whole": Replacement(mx.array(normal(8, 8))),
        "parts": Stack(((0, 4, Delta(Scaling(mx.array(normal(1, 8))))), (4, 8, columns)), 8),
    }


@pytest.mark.parametrize("kind", every_change())
def test_16_bit_activations_stay_16_bit(kind: str):
    for magnitude in (None, mx.array(normal(8)), mx.array(normal(1, 8))):
        layer = nn.Linear(8, 8)
        layer.set_dtype(mx.bfloat16)
        adapted = AdaptedLinear(layer)
        adapted.shares = [AdapterLayer("", Delta(every_change()[kind], mx.array(normal(8)), magnitude), 0.7)]
        adapted.shares[0].weigh(0.7, Base(layer))
        assert adapted(mx.array(normal(3, 8)).astype(mx.bfloat16)).dtype == mx.bfloat16
