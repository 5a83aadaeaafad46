"""Prefixes are found, averages come last, foreign names are known by rule. Files: test_layouts.py."""

import pytest

from flux.weights import prefixes

NAMES = ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.proj.weight"]


@pytest.mark.parametrize("average", ["ema.", "model_ema.", "ema_model.", "module.ema."])
def test_an_average_counts_only_where_it_is_alone(average):
    """Even where it is the first in the file, and has more names."""
    copies = [average + name for name in [*NAMES, "double_blocks.1.img_attn.qkv.weight"]]
    own = prefixes.bare_names_of("transformer", [*copies, *("model." + name for name in NAMES)])
    assert own == {"model." + name: name for name in NAMES}
    assert prefixes.bare_names_of("transformer", [*copies, *NAMES]) == {name: name for name in NAMES}
    assert len(prefixes.bare_names_of("transformer", copies)) == 4


def test_parts_by_their_names():
    adapter = ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "lora_unet_x.lora_up.weight"]
    assert prefixes.parts_in(adapter) == []
    assert prefixes.parts_in(["vision_model.encoder.layers.0.mlp.fc1.weight"]) == []
    assert prefixes.parts_in(["decoder.block.0.layer.0.SelfAttention.q.weight"]) == []
    for suffix in ("", "._data", ".absmax", ".quant_state.bitsandbytes__nf4"):  # of other programs' encodings
        assert prefixes.parts_in([f"model.{NAMES[1]}{suffix}"]) == ["transformer"]


def test_unknown_names_stay_for_the_check():
    """A rule, not whatever is left over: a name that is spelled wrong is still told."""
    own = prefixes.bare_names_of("transformer", [*NAMES, "stray.weight", "__x0__", "model_ema.decay"])
    assert set(own.values()) == {*NAMES, "stray.weight"}
    assert prefixes.foreign_names([*NAMES, "stray.weight", "__x0__", "scaled_fp8"]) == ["__x0__"]
