"""txt2image.py with ControlNets: options in order, the recipe and --remake, and what is refused."""

import json
import re

import numpy as np
import pytest

from flux import images

from .. import controlnets

OPTIONS = ("a red apple", "--seed", 1, "--image-size", "32x48", "--steps", 2)


@pytest.fixture
def nets(tmp_path) -> dict[str, str]:
    """A ControlNet of each kind, in folders of the test's, and two control pictures beside them."""
    for kind in controlnets.OURS:
        network = controlnets.make(kind)
        controlnets.write_ours(tmp_path / kind / "diffusion_pytorch_model.safetensors", network)
        config = {"axes_dims_rope": list(network.params.axes_dim)}
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        images.save(tmp_path / name, pixels)
    return {kind: str(tmp_path / kind) for kind in controlnets.OURS}


def test_several_with_their_recipe(call, model, nets, tmp_path):
    two = ("--controlnet", nets["union"], "--control", "a.png", "--control-mode", "depth")
    two += ("--controlnet", nets["xlabs"], "--control", "b.png", "--control-mode", "none")
    more = ("--control-strength", 0.7, "--control-end", 0.5, "--control-end", 1)
    status, _, err = call(*OPTIONS, "--model", model, *two, *more, "--output", "out.png")
    assert status == 0, err
    text = images.read_metadata(tmp_path / "out.png")
    assert text["controlnet"] == f"{nets['union']}\n{nets['xlabs']}"
    assert text["control"] == "a.png\nb.png"
    assert text["control_mode"] == "depth\nnone"
    assert (text["control_strength"], text["control_end"]) == ("0.7", "0.5\n1.0")
    assert re.fullmatch(r"[0-9a-f]{64} a\.png\n[0-9a-f]{64} b\.png", text["pictures"])
    assert call("--remake", "out.png", "--output", "again.png")[0] == 0
    assert images.read_metadata(tmp_path / "again.png") == text
    again, _ = images.load(tmp_path / "again.png")
    assert np.array_equal(again, images.load(tmp_path / "out.png")[0])
    assert call("--remake", "out.png", "--control-strength", 0.1, "--output", "weaker.png")[0] == 0
    weaker, _ = images.load(tmp_path / "weaker.png")
    assert not np.array_equal(weaker, again)
    (tmp_path / "b.png").unlink()
    status, _, err = call("--remake", "out.png")
    assert status == 2
    assert "cannot read the picture b.png: No such file" in err[-1]


def test_quantized_controlnets_are_reported(call, model, nets):
    status, _, err = call(
        *OPTIONS, "--model", model, "--controlnet", nets["single"], "--control", "a.png", "--quantize"
    )
    assert status == 0, err
    assert re.search(r"^quantized: .*; ControlNet 1 \d+ of \d+ layers, 4 bits", "\n".join(err), re.MULTILINE)


SINGLE = ("--controlnet", "single", "--control", "a.png")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--control", "a.png"], "dev takes no control picture: .* or a --controlnet"),
        (["--control-mode", "canny"], "--control-mode is of a ControlNet; name it with --controlnet"),
        (["--controlnet", "union"], r"1 ControlNet\(s\) and 0 control picture\(s\): give a --control for"),
        (["--controlnet", "union", "--control", "a.png"], "a union: it needs the control picture's mode, c"),
        ([*SINGLE, "--control-mode", "canny"], "takes no mode: leave out"),
        (["--controlnet", "single", "--control", "gone.png"], "cannot read the picture gone.png: No such"),
        (["--controlnet", "gone", "--control", "a.png"], r"gone: no such file \(for the ControlNet\)"),
        ([*SINGLE, "--control-start", 0.5, "--control-end", 0.2], "0 <= start"),
        ([*SINGLE, "--control-strength", "nan"], "a finite number, not nan"),
        ([*SINGLE, "--control-end", 0.5, "--control-end", 1], "give one for all ControlNets, or 1, one for"),
    ],
)
def test_bad_options_are_one_line(call, model, nets, options, line, tmp_path):
    status, out, err = call(*OPTIONS, "--model", model, *options)
    assert status == 2
    assert not out
    assert re.search(line, err[-1])
    assert not (tmp_path / "out.png").exists()
