"""Adapter files made by hand from the formats' description; dW is computed here once more, with numpy."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.adapters import Adapter, load
from flux.adapters import names as keys
from flux.errors import FluxError
from flux.weights.keymaps import TRANSFORMER

from .adapter_files import (
    CLIP_LAYER,
    HIDDEN,
    MLP,
    RANK,
    SHAPES,
    T5_LAYER,
    close,
    dense,
    lora,
    normal,
    pair,
    read_numpy,
)


def check_reads(stems: dict[str, str], down_name: str, up_name: str, alpha: float | None = None) -> Adapter:
    """Writes one pair of matrices for each stem (our module -> the file's name for it) and compares dW."""
    tensors, expected = {}, {}
    for module, stem in stems.items():
        down, up = pair(*SHAPES.get(module, (HIDDEN, HIDDEN)))
        expected[module] = up @ down * (1 if alpha is None else alpha / RANK)
        tensors |= {stem + down_name: down, stem + up_name: up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, dtype=np.float32)
    adapter = read_numpy(tensors)
    assert adapter.unexpected == []
    assert adapter.modules.keys() == expected.keys()
    for module, value in expected.items():
        assert close(dense(adapter, module), value), module
    return adapter


# --- Names ---


def test_kohya():
    stems = {module: "lora_unet_" + module.replace(".", "_") for module in SHAPES}
    stems[CLIP_LAYER] = "lora_te1_text_model_encoder_layers_11_self_attn_q_proj"
    stems[T5_LAYER] = "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0"
    adapter = check_reads(stems, ".lora_down.weight", ".lora_up.weight", alpha=1.5)
    assert adapter.format == "kohya"
    assert adapter.parts() == ["flux", "clip", "t5"]
    assert list(adapter.part("t5").modules) == [T5_LAYER]


def test_every_text_layer_has_a_home():
    for layer in [*keys.CLIP, *keys.T5]:
        module = layer.format(3)
        for prefix in ("lora_te1_", "lora_te3_", "lora_te_"):
            assert keys.find_module(prefix + module.replace(".", "_")).module == module
    assert keys.find_module("text_encoder.encoder.layers.0.mlp.fc1").module.startswith("text_model.")
    assert keys.find_module("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1")
    assert keys.find_module("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.o")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "base_model.model.", ""])
@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_down.weight", ".lora_up.weight"),
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_comfyui_suffixes_on_bfl_names(prefix: str, down: str, up: str):
    check_reads({module: prefix + module for module in SHAPES}, down, up, alpha=5.0)


ONE_TO_ONE = {row.ours: row.theirs[0] for row in TRANSFORMER if len(row.theirs) == 1 and not row.swapped}


@pytest.mark.parametrize("prefix", ["transformer.", "lycoris_", "lora_transformer_", "base_model.model."])
def test_diffusers_names(prefix: str):
    stems = {}
    for module in SHAPES:
        number = "".join(c for c in module.split(".")[1] if c.isdigit()) if "blocks" in module else ""
        if theirs := ONE_TO_ONE.get(module.replace(f".{number}.", ".{}.", 1)):
            stem = theirs.format(number)
            stems[module] = prefix + (stem.replace(".", "_") if prefix.endswith("_") else stem)
    assert len(stems) == len(SHAPES) - 3  # qkv, linear1 and the swapped layer have tests of their own
    check_reads(stems, ".lora_A.weight", ".lora_B.weight")
    check_reads(stems, ".lora_down.weight", ".lora_up.weight", alpha=0.5)


def test_xlabs():
    single = "single_blocks.1.processor."
    stems = {
        "double_blocks.1.img_attn.qkv": "double_blocks.1.processor.qkv_lora1",
        "double_blocks.0.txt_attn.proj": "diffusion_model.double_blocks.0.processor.proj_lora2",
        "double_blocks.0.img_attn.proj": "double_blocks.0.processor.proj_lora1",
    }
    assert check_reads(stems, ".down.weight", ".up.weight").format == "XLabs"
    down, up = pair(3 * HIDDEN, HIDDEN)
    down2, up2 = pair(HIDDEN, HIDDEN + MLP)
    adapter = read_numpy(
        {
            f"{single}qkv_lora.down.weight": down,
            f"{single}qkv_lora.up.weight": up,
            f"{single}proj_lora.down.weight": down2,
            f"{single}proj_lora.up.weight": up2,
        }
    )
    whole = np.concatenate([up @ down, np.zeros((MLP, HIDDEN), np.float32)])
    assert close(dense(adapter, "single_blocks.1.linear1"), whole)
    assert close(dense(adapter, "single_blocks.1.linear2"), up2 @ down2)


def test_mlx_examples_is_transposed():
    names = {
        module: module.replace("mlp.", "mlp.layers.")
        for module in SHAPES
        if "mlp" in module or "attn" in module
    }
    tensors, expected = {}, {}
    for module, name in names.items():
        down, up = pair(*SHAPES[module])
        tensors |= {f"{name}.lora_a": down.T, f"{name}.lora_b": up.T}
        expected[module] = up @ down
    adapter = read_numpy(tensors, {"lora_rank": str(RANK), "lora_blocks": "-1"})
    assert adapter.format == "mlx-examples"
    assert adapter.unexpected == []
    assert all(close(dense(adapter, module), value) for module, value in expected.items())


def test_mlx_examples_square_matrices():
    """Rank equal to both sizes: shapes cannot tell the transposition, the name does."""
    down, up = pair(HIDDEN, HIDDEN, HIDDEN)
    name = "double_blocks.0.img_attn.proj"
    adapter = read_numpy({f"{name}.lora_a": down.T, f"{name}.lora_b": up.T})
    assert close(dense(adapter, name), up @ down)


@pytest.mark.parametrize("transposed", [False, True])
def test_mflux(transposed: bool):
    names = {
        "double_blocks.1.img_mlp.0": "transformer.transformer_blocks.1.ff.linear1",
        "double_blocks.0.txt_mlp.2": "transformer.transformer_blocks.0.ff_context.linear2",
        "double_blocks.0.txt_attn.proj": "transformer.transformer_blocks.0.attn.to_add_out",
    }
    tensors, expected = {}, {}
    for module, name in names.items():
        down, up = pair(*SHAPES[module])
        turn = np.transpose if transposed else np.array
        tensors |= {f"{name}.lora_A": turn(down), f"{name}.lora_B": turn(up)}
        expected[module] = up @ down
    adapter = read_numpy(tensors)
    assert adapter.format == "mflux"
    assert all(close(dense(adapter, module), value) for module, value in expected.items())


def test_block_numbers_of_two_digits():
    assert keys.find_module("lora_unet_single_blocks_37_linear2").module == "single_blocks.37.linear2"
    assert (
        keys.find_module("transformer.single_transformer_blocks.12.proj_out").module
        == "single_blocks.12.linear2"
    )
    assert keys.find_module("transformer.proj_out").module == "final_layer.linear"


# --- Split layers ---


def test_split_layers_with_own_alphas_ranks_and_gaps():
    stem = "transformer.single_transformer_blocks.0."
    tensors, rows = {}, []
    for i, (name, size) in enumerate({"attn.to_q": HIDDEN, "attn.to_v": HIDDEN, "proj_mlp": MLP}.items()):
        down, up = pair(size, HIDDEN, rank=i + 1)
        tensors |= {f"{stem}{name}.lora_A.weight": down, f"{stem}{name}.lora_B.weight": up}
        tensors[f"{stem}{name}.alpha"] = np.array(2.5, np.float32)
        rows.append(up @ down * 2.5 / (i + 1))
    adapter = read_numpy(tensors)
    rows.insert(1, np.zeros((HIDDEN, HIDDEN), np.float32))  # to_k is missing
    assert close(dense(adapter, "single_blocks.0.linear1"), np.concatenate(rows))
    assert adapter.modules["single_blocks.0.linear1"].change.rank == 1 + 2 + 3


def test_last_part_missing():
    down, up = pair(HIDDEN, HIDDEN)
    stem = "transformer.single_transformer_blocks.0.attn.to_k"
    adapter = read_numpy({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    expected = np.zeros((3 * HIDDEN + MLP, HIDDEN), np.float32)
    expected[HIDDEN : 2 * HIDDEN] = up @ down
    assert close(dense(adapter, "single_blocks.0.linear1"), expected)


def test_halves_are_swapped_in_up_alone():
    down, up = pair(2 * HIDDEN, HIDDEN, rank=4)  # an even rank, so that a swap of down too would go unnoticed
    stem = "transformer.norm_out.linear"
    adapter = read_numpy({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    swapped = np.concatenate([up[HIDDEN:], up[:HIDDEN]])
    assert close(dense(adapter, "final_layer.adaLN_modulation.1"), swapped @ down)


# --- Alpha ---


def test_alpha_precedence():
    name, stem = "double_blocks.0.img_attn.proj", "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = lora(stem, alpha=7)
    config = {"transformer.r": RANK, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {}}
    assert read_numpy(tensors).alphas()[name] == 7
    with_config = {"lora_adapter_metadata": json.dumps(config)}
    assert read_numpy(tensors, with_config).alphas()[name] == 2
    config["transformer.alpha_pattern"] = {"transformer_blocks.1.attn.to_out.0": 4, "attn.to_out.0": 5}
    assert read_numpy(tensors, {"lora_adapter_metadata": json.dumps(config)}).alphas()[name] == 5
    assert read_numpy(lora(stem)).alphas()[name] == RANK


def test_configs_of_two_networks_are_kept_apart():
    tensors = lora("transformer.x_embedder") | lora("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    config = {"transformer.lora_alpha": 2, "text_encoder.lora_alpha": 9}
    alphas = read_numpy(tensors, {"lora_adapter_metadata": json.dumps(config)}).alphas()
    assert alphas == {"img_in": 2, "text_model.encoder.layers.0.mlp.fc1": 9}


@pytest.mark.parametrize(
    "pattern", ["^encoder.layers.0.mlp.fc1", "^text_model.encoder.layers.0.mlp.fc1", "fc1"]
)
def test_patterns_for_clip_of_old_and_new_transformers(pattern: str):
    tensors = lora("text_encoder.text_model.encoder.layers.0.mlp.fc1") | lora("transformer.x_embedder")
    config = {"text_encoder.lora_alpha": 9, "text_encoder.alpha_pattern": {pattern: 4}}
    alphas = read_numpy(tensors, {"lora_adapter_metadata": json.dumps(config)}).alphas()
    assert alphas == {"img_in": RANK, "text_model.encoder.layers.0.mlp.fc1": 4}


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[1]", "JSON object, not a list")])
def test_damaged_metadata(text: str, words: str):
    with pytest.raises(FluxError, match=words):
        read_numpy(lora("img_in"), {"lora_adapter_metadata": text})


def test_alpha_of_shape_one():
    tensors = lora("img_in") | {"img_in.alpha": np.array([6.0], np.float32)}
    assert read_numpy(tensors).alphas() == {"img_in": 6}


# --- Other kinds of change ---


def test_control_lora():
    tensors = lora("double_blocks.0.img_attn.qkv", 3 * HIDDEN) | lora("img_in", columns=8)
    bias, scale = normal(3 * HIDDEN), normal(4)
    tensors["double_blocks.0.img_attn.qkv.lora_B.bias"] = bias
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = scale
    adapter = read_numpy({f"base_model.model.{name}": t for name, t in tensors.items()})
    assert adapter.format == "control LoRA (BFL)"
    assert adapter.unexpected == []
    assert adapter.modules["img_in"].shape == (HIDDEN, 8)
    assert close(adapter.modules["double_blocks.0.img_attn.qkv"].bias, bias)
    assert close(adapter.replaced["double_blocks.0.img_attn.norm.query_norm.scale"], scale)


def test_bias_of_up_is_scaled_with_it():
    tensors = lora("img_in", alpha=6) | {"img_in.lora_B.bias": np.ones(HIDDEN, np.float32)}
    tensors["img_in.diff_b"] = np.full(HIDDEN, 10, np.float32)
    assert close(read_numpy(tensors).modules["img_in"].bias, np.full(HIDDEN, 6 / RANK + 10))


def test_dense_differences():
    weight, bias, scale = normal(HIDDEN, 4), normal(HIDDEN), normal(4)
    norm = "double_blocks.0.txt_attn.norm.key_norm"
    adapter = read_numpy(
        {
            "diffusion_model.img_in.diff": weight,
            "diffusion_model.txt_in.diff_b": bias,
            f"diffusion_model.{norm}.diff": scale,
            "diffusion_model.double_blocks.1.img_attn.norm.key_norm.scale.diff": scale,
        }
    )
    assert close(dense(adapter, "img_in"), weight)
    assert adapter.modules["txt_in"].change is None
    assert close(adapter.modules["txt_in"].bias, bias)
    assert len(adapter.added) == 2
    assert close(adapter.added[f"{norm}.scale"], scale)


LOKR = {
    "whole factors": ({"w1": (2, 4), "w2": (4, 2)}, 1.0),
    "second a product": ({"w1": (2, 4), "w2_a": (4, 3), "w2_b": (3, 2)}, 1.5 / 3),
    "both products": ({"w1_a": (2, 3), "w1_b": (3, 4), "w2_a": (4, 3), "w2_b": (3, 2)}, 1.5 / 3),
    "with a core": ({"w1": (2, 4), "w2_a": (3, 4), "w2_b": (3, 2), "t2": (3, 3, 1, 1)}, 1.5 / 3),
}


@pytest.mark.parametrize(("shapes", "scale"), LOKR.values(), ids=LOKR)
def test_lokr(shapes: dict, scale: float):
    f = {name: normal(*shape) for name, shape in shapes.items()}
    w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "t2" in f:
        w2 = np.einsum("ij,jr,ip->pr", f["t2"][:, :, 0, 0], f["w2_b"], f["w2_a"])
    else:
        w2 = f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"]
    expected = np.kron(w1, w2) * scale
    for stem in ("lora_unet_double_blocks_0_img_attn_proj", "lycoris_transformer_blocks_0_attn_to_out_0"):
        tensors = {f"{stem}.lokr_{name}": value for name, value in f.items()}
        adapter = read_numpy({**tensors, f"{stem}.alpha": np.array(1.5, np.float32)})
        assert adapter.unexpected == []
        assert close(dense(adapter, "double_blocks.0.img_attn.proj"), expected)


def test_lokr_under_split_names():
    tensors, rows = {}, []
    for name in ("q", "k", "v"):
        w1, w2 = normal(2, 4), normal(4, 2)
        stem = f"lycoris_transformer_blocks_0_attn_to_{name}"
        tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}
        rows.append(np.kron(w1, w2))
    assert close(dense(read_numpy(tensors), "double_blocks.0.img_attn.qkv"), np.concatenate(rows))


@pytest.mark.parametrize(
    "name", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"]
)
def test_dora(name: str):
    magnitude = normal(HIDDEN)
    shape = (HIDDEN, 1) if name == "dora_scale" else (HIDDEN,)
    adapter = read_numpy(lora("img_in") | {f"img_in.{name}": magnitude.reshape(shape)})
    assert close(adapter.modules["img_in"].magnitude, magnitude)


def test_dora_on_some_parts():
    stem = "transformer.transformer_blocks.0.attn.to_"
    magnitude = normal(HIDDEN)
    tensors = lora(stem + "q") | lora(stem + "v") | {stem + "v.lora_magnitude_vector": magnitude}
    found = np.array(read_numpy(tensors).modules["double_blocks.0.img_attn.qkv"].magnitude)
    assert np.isnan(found[: 2 * HIDDEN]).all()
    assert np.array_equal(found[2 * HIDDEN :], magnitude)


# --- What is unexpected ---


def test_unknown_keys_are_named(tmp_path: Path):
    tensors = lora("double_blocks.0.img_attn.proj") | {
        "lora_unet_input_blocks_1_0.lora_down.weight": normal(2, 2),  # Stable Diffusion's
        "double_blocks.0.img_attn.proj.hada_w1_a": normal(2, 2),  # LoHa
        "img_in.lora_A.weight": normal(2, 2),  # no up
        "double_blocks.3.img_attn.qkv.weight": normal(2, 2),
        "txt_in.alpha": normal(1),
    }
    path = tmp_path / "odd.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(t) for name, t in tensors.items()})
    unexpected = load(path).unexpected
    assert len(unexpected) == 5
    assert any("img_in.lora_A.weight (its partner is missing)" in line for line in unexpected)
    with pytest.raises(FluxError, match="5 unexpected keys") as error:
        load(path, strict=True)
    assert all(name in str(error.value) for name in list(tensors)[2:])


def test_same_layer_twice():
    tensors = lora("double_blocks.0.img_attn.proj") | lora("lora_unet_double_blocks_0_img_attn_proj")
    adapter = read_numpy(tensors)
    assert len(adapter.unexpected) == 2
    assert "says the same as" in adapter.unexpected[0]
    twice = lora("double_blocks.0.img_attn.qkv", 3 * HIDDEN) | lora(
        "transformer.transformer_blocks.0.attn.to_q"
    )
    with pytest.raises(FluxError, match="do not fit together"):
        read_numpy(twice)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "no adapter for FLUX.1"),
        ({"img_in.lora_A.weight": (2, 4), "img_in.lora_B.weight": (8, 3)}, "no rank in common"),
        ({"img_in.lora_A.weight": (2, 4, 1), "img_in.lora_B.weight": (8, 2)}, "cannot be a matrix"),
        (
            {"img_in.lora_A.weight": (2, 4), "img_in.lora_B.weight": (8, 2), "img_in.dora_scale": (1, 5)},
            "8 rows or 4 columns",
        ),
    ],
)
def test_bad_files(tensors: dict, words: str):
    with pytest.raises(FluxError, match=words):
        read_numpy({name: normal(*shape) for name, shape in tensors.items()})


def test_bad_paths(tmp_path: Path):
    with pytest.raises(FluxError, match="cannot be read"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(FluxError, match="a folder without"):
        load(tmp_path)
    cut = tmp_path / "cut.safetensors"
    mx.save_safetensors(str(cut), {name: mx.array(t) for name, t in lora("img_in").items()})
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(FluxError, match="cut short"):
        load(cut)
