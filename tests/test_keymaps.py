"""Key maps: every name and shape of the full-size models in both layouts, both ways, not allocated."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from flux.weights import keymaps, prefixes

REFERENCE = Path(__file__).parent / "reference"


def reference(name: str) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v) for k, v in json.loads((REFERENCE / f"{name}.json").read_text()).items()}


def lazy(shapes: dict) -> dict[str, mx.array]:
    """Arrays of these shapes that are never evaluated, and so never allocated."""
    return {name: mx.zeros(shape) for name, shape in shapes.items()}


def shapes(tensors: dict) -> dict:
    return {name: tensor.shape for name, tensor in tensors.items()}


def numbered(names_and_shapes: dict, scale: int) -> dict[str, mx.array]:
    """Small arrays with distinct values: sizes divided by `scale`."""
    out, start = {}, 0
    for name, shape in names_and_shapes.items():
        small = [max(1, n // scale) for n in shape]
        size = 1
        for n in small:
            size *= n
        out[name] = (start + mx.arange(size)).reshape(small)
        start += size
    return out


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


def test_all_of_the_transformer():
    ours, theirs = reference("flux1-dev.bfl"), reference("flux1-dev.diffusers")
    assert len(ours) == 780
    assert shapes(keymaps.from_diffusers(keymaps.TRANSFORMER, lazy(theirs))) == ours
    assert shapes(keymaps.to_diffusers(keymaps.TRANSFORMER, lazy(ours), hidden=3072)) == theirs


def test_all_of_the_autoencoder():
    ours, theirs = reference("ae.bfl"), reference("ae.diffusers")
    rows = keymaps.autoencoder(keymaps.levels(theirs))
    assert keymaps.levels(ours) == keymaps.levels(theirs) == 4
    flat = {k: v[:2] if ".attn_1." in k else v for k, v in ours.items()}
    assert shapes(keymaps.from_diffusers(rows, lazy(theirs))) == flat
    assert shapes(keymaps.to_diffusers(rows, lazy(flat))) == theirs
    for file in (ours, theirs):
        inner = keymaps.to_ours("ae", lazy(file))
        assert inner["decoder.conv_in.weight"].shape == (512, 3, 3, 16)
        assert inner["decoder.mid.attn_1.q.weight"].shape == (512, 512)
        assert shapes(keymaps.to_file("ae", inner, diffusers=False)) == ours
        assert shapes(keymaps.to_file("ae", inner, diffusers=True)) == theirs


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_values_both_ways_and_twice(part):
    if part == "transformer":
        rows, hidden = keymaps.TRANSFORMER, 3072 // 256
        few = {k: v for k, v in reference("flux1-dev.bfl").items() if "blocks." not in k or ".1." in k}
    else:
        rows, hidden = keymaps.autoencoder(4), 0
        few = {k: v[:2] if ".attn_1." in k else v for k, v in reference("ae.bfl").items()}
    ours = numbered(few, 256 if part == "transformer" else 32)
    theirs = keymaps.to_diffusers(rows, ours, hidden)
    assert not equal(ours, theirs)
    assert equal(keymaps.from_diffusers(rows, theirs), ours)
    assert equal(keymaps.from_diffusers(rows, ours), ours)  # twice is once
    assert equal(keymaps.to_diffusers(rows, theirs, hidden), theirs)


def test_rows_lie_where_diffusers_has_them():
    """qkv is (q, k, v), linear1 is (q, k, v, mlp), final's shift comes first: spelled out, small."""
    t = {
        f"single_transformer_blocks.3.{name}.bias": mx.array([i] * (2 if i < 3 else 8))
        for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    }
    t["norm_out.linear.bias"] = mx.array([1, 2, 30, 40])
    out = keymaps.from_diffusers(keymaps.TRANSFORMER, t)
    assert out["single_blocks.3.linear1.bias"].tolist() == [0, 0, 1, 1, 2, 2] + [3] * 8
    assert out["final_layer.adaLN_modulation.1.bias"].tolist() == [30, 40, 1, 2]


def test_an_incomplete_layer_keeps_its_names():
    t = {"transformer_blocks.0.attn.to_q.weight": mx.zeros((2, 2)), "stray.weight": mx.zeros(1)}
    assert keymaps.from_diffusers(keymaps.TRANSFORMER, t).keys() == t.keys()


def test_module_names():
    place = keymaps.find_ours(keymaps.TRANSFORMER, "transformer_blocks.12.attn.add_k_proj")
    assert (place.module, place.part) == ("double_blocks.12.txt_attn.qkv", 1)
    row, theirs = keymaps.find_theirs(keymaps.TRANSFORMER, "single_blocks.7.linear1")
    assert theirs[3] == "single_transformer_blocks.7.proj_mlp"
    assert not row.swapped
    assert keymaps.find_ours(keymaps.TRANSFORMER, "double_blocks.0.img_attn.qkv") is None


@pytest.mark.parametrize("part", ["clip", "t5"])
@pytest.mark.parametrize("which", range(3))
def test_prefixes_of_the_text_encoders(part, which):
    bare = list(reference({"clip": "clip_l.transformers", "t5": "t5xxl.transformers"}[part]))
    wanted = set(bare) - {"encoder.embed_tokens.weight"}
    prefix = ("", *prefixes.PREFIXES[part])[which]
    names = [prefix + name for name in bare]
    if prefix:
        names += ["model.diffusion_model.img_in.weight", "vae.encoder.conv_in.weight", "clip_l.logit_scale"]
    own = prefixes.bare_names_of(part, names)
    assert set(own.values()) == wanted
    assert len(own) == len(wanted)


def test_clip_without_text_model_and_with_company():
    bare = list(reference("clip_l.transformers"))
    names = [name.removeprefix("text_model.") for name in bare]
    assert list(prefixes.bare_names_of("clip", names).values()) == bare
    company = ["text_projection.weight", "logit_scale", "text_model.embeddings.position_ids"]
    assert list(prefixes.bare_names_of("clip", bare + company).values()) == bare
    assert "stray" in prefixes.bare_names_of("clip", [*bare, "stray"]).values()  # is not hidden


def test_t5_embedding_under_its_second_name():
    own = prefixes.bare_names_of("t5", ["encoder.embed_tokens.weight", "encoder.final_layer_norm.weight"])
    assert own["encoder.embed_tokens.weight"] == "shared.weight"
