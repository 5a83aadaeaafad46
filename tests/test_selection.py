"""Layers named as their trainers name them."""

import flux  # noqa: F401  before mlx.core

# isort: split
import pytest

from flux.adapters.lora import linears
from flux.adapters.selection import is_preset, items, partly_named, select
from flux.errors import FluxError
from flux.models.transformer import Flux

from . import tiny

LAYERS = list(linears(Flux(tiny.FLUX)))
LAST = f"single_blocks.{tiny.FLUX.depth_single_blocks - 1}"


def block(number: int, kind: str = "single") -> list[str]:
    return [name for name in LAYERS if name.startswith(f"{kind}_blocks.{number}.")]


def every(end: str) -> list[str]:
    return [name for name in LAYERS if name.endswith(end)]


SELECTED = {
    "single_blocks.1.linear2": ["single_blocks.1.linear2"],
    "single_transformer_blocks.1.proj_out": ["single_blocks.1.linear2"],
    "transformer.single_transformer_blocks.1.proj_out": ["single_blocks.1.linear2"],
    "model.diffusion_model.single_blocks.1.linear2": ["single_blocks.1.linear2"],
    "lora_unet_single_blocks_1_linear2": ["single_blocks.1.linear2"],
    "lora_unet_single_transformer_blocks_1_proj_out": ["single_blocks.1.linear2"],
    "single_blocks_1_linear2": ["single_blocks.1.linear2"],
    "single_blocks.1": block(1),  # and not block 10
    "lora_unet_single_blocks_1": block(1),
    "transformer_blocks.1": block(1, "double"),  # and not single_transformer_blocks.1
    "img_attn": [*every("img_attn.qkv"), *every("img_attn.proj")],
    "linear2": every(".linear2"),
    "ff": [*every("img_mlp.0"), *every("img_mlp.2")],
    "proj_mlp": every(".linear1"),
    "norm1.linear": every("img_mod.lin"),
    r"single_blocks\.(0|1)\..*": [*block(0), *block(1)],
    r".*blocks\.1\.(linear1|img_mod\.lin)": ["double_blocks.1.img_mod.lin", "single_blocks.1.linear1"],
    r"single_transformer_blocks\.[01]\.proj_out": ["single_blocks.0.linear2", "single_blocks.1.linear2"],
    "single_blocks.*.linear2": every(".linear2"),
    "*single_blocks.1.*": block(1),
    "single_blocks.0.linear2, single_blocks.1.linear2": [
        "single_blocks.0.linear2",
        "single_blocks.1.linear2",
    ],
    r"single_blocks\.\d{1,2}\.linear1,img_in": ["img_in", *every(".linear1")],
    "all": LAYERS,
    "attention,img_in": ["img_in", *select(LAYERS, "attention")],
}


@pytest.mark.parametrize("which", SELECTED)
def test_what_is_selected(which):
    found = select(LAYERS, which)
    assert set(found) == set(SELECTED[which])
    assert found == [name for name in LAYERS if name in found], "in the order of the network"


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("single_block.1.linear2", r"targets 'single_block\.1\.linear2': .* nearest names: single_blocks\.1"),
        ("attn.to_kq", r"nearest names: .*attn\.to_[kq]"),
        ("single_blocks.(1", r"not a pattern \(missing \)"),
        ("linear1,nothing_here", "targets 'nothing_here': no layer"),
        ("single_blocks.99", r"single_blocks\.99.*no layer"),
        (" , ", "name layers, or one of attention-mlp"),
    ],
)
def test_what_selects_nothing_is_named_with_what_is_near(which, words):
    with pytest.raises(FluxError, match=words):
        select(LAYERS, which)


def test_items():
    assert items(r"a{1,2},[b,c].(d|,e) ,, f") == ["a{1,2}", "[b,c].(d|,e)", "f"]
    assert is_preset("attention, all")
    assert not is_preset("attention,img_in")


def test_parts_of_fused_layers():
    """Who names one of the parts trains the whole layer, and is told; who names all of them need not be."""
    qkv = every("img_attn.qkv")
    assert partly_named(LAYERS, "transformer_blocks.0.attn.to_q") == {
        "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn.to_q",)
    }
    found = partly_named(LAYERS, "to_q,to_k,to_v")
    assert set(found) == set(every(".linear1")), "whose fourth part is proj_mlp"
    assert not set(qkv) & set(found)
    assert partly_named(LAYERS, "to_q,to_k,to_v,proj_mlp") == {}
    assert partly_named(LAYERS, "to_q,attention") == {}
    assert partly_named(LAYERS, "lora_unet_transformer_blocks_0_attn_to_k") == {
        "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn.to_k",)
    }
