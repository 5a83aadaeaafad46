"""`python -m flux.adapters`, as a program."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flux.adapters import Adapter, Adapters, Delta, LowRank, load, save
from flux.adapters.__main__ import main
from flux.weights import checkpoints
from flux.weights.save import save_diffusers

from .. import tiny

HIDDEN = tiny.FLUX.hidden_size


def an_adapter() -> Adapter:
    shapes = {
        "double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN),
        "double_blocks.1.img_attn.qkv": (3 * HIDDEN, HIDDEN),
        "single_blocks.0.linear2": (HIDDEN, 5 * HIDDEN),
        "text_model.encoder.layers.0.mlp.fc1": (96, 32),
    }
    modules = {
        name: Delta(LowRank(mx.random.normal((4, columns)), mx.random.normal((rows, 4)), 2.0))
        for name, (rows, columns) in shapes.items()
    }
    return Adapter(modules)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save(path, an_adapter(), "native", {"trigger": "sks dog"})
    return path


@pytest.fixture
def odd_file(tmp_path: Path, file: Path) -> Path:
    """With one key that is unexpected."""
    path = tmp_path / "odd.safetensors"
    mx.save_safetensors(str(path), {**mx.load(str(file)), "img_in.hada_w1_a": mx.zeros((2, 2))})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_diffusers(folder / "tiny", tiny.model(*tiny.write_tokenizers(folder)))
    return folder / "tiny"


def test_inspect(file: Path, odd_file: Path, capsys: pytest.CaptureFixture):
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "transformer: 3 layers" in out
    assert "CLIP: 1 layers" in out
    assert "double_blocks.*.img_attn.qkv    2 x LoRA rank 4 alpha 2" in out
    assert "trigger: sks dog" in out
    assert main(["inspect", str(odd_file)]) == 0
    assert "unexpected key: img_in.hada_w1_a" in capsys.readouterr().out


def test_check(file: Path, odd_file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["check", str(file), "--model", str(model)]) == 0
    assert f"4 of 4 layers fit {model}" in capsys.readouterr().out
    assert main(["check", str(odd_file), "--model", str(model)]) == 1
    assert "unexpected key: img_in.hada_w1_a" in capsys.readouterr().out
    adapter = an_adapter()
    adapter.modules["single_blocks.40.linear2"] = adapter.modules["single_blocks.0.linear2"]
    save(tmp_path / "big.safetensors", adapter, "kohya")
    assert main(["check", str(tmp_path / "big.safetensors"), "--model", str(model)]) == 1
    assert (
        "does not fit: single_blocks.40.linear2 (transformer): the model has no such"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("format", ["native", "kohya", "diffusers"])
def test_convert(format: str, file: Path, tmp_path: Path):
    out = tmp_path / "new" / "b.safetensors"
    assert main(["convert", str(file), "--to", format, str(out)]) == 0
    found, adapter = load(out, strict=True), load(file)
    for name, delta in adapter.modules.items():
        assert mx.allclose(found.modules[name].change.dense(), delta.change.dense(), rtol=1e-6, atol=1e-6)
    assert [p.name for p in out.parent.iterdir()] == ["b.safetensors"]


def test_convert_names_what_it_leaves_out(odd_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "b.safetensors"
    assert main(["convert", str(odd_file), "--to", "kohya", str(out), "--strict"]) == 2
    assert "error:" in (said := capsys.readouterr().err)
    assert "1 unexpected keys: img_in.hada_w1_a" in said
    assert not out.exists()
    assert main(["convert", str(odd_file), "--to", "kohya", str(out)]) == 0
    assert "left out, unexpected key: img_in.hada_w1_a" in capsys.readouterr().err


def test_errors_are_one_line(file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    text = tmp_path / "text.safetensors"
    text.write_text("this is no adapter at all")
    for arguments in (
        ["inspect", str(tmp_path / "none.safetensors")],
        ["inspect", str(text)],
        ["check", str(file), "--model", str(tmp_path / "none")],
        ["convert", str(file), "--to", "kohya", str(tmp_path / "b.bin")],
        ["convert", str(file), "--to", "kohya", str(file / "b.safetensors")],
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_as_a_program():
    program = [sys.executable, "-m", "flux.adapters"]
    run = subprocess.run([*program, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert all(command in run.stdout for command in ("inspect", "check", "convert"))
    run = subprocess.run([*program, "inspect", "none"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "error: none: cannot be read: No such file or directory\n"


def test_several_files_folders_and_patterns(
    file: Path, odd_file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["inspect", str(file), str(odd_file)]) == 0
    out = capsys.readouterr().out
    assert out.index(f"{file}: native") < out.index(f"{odd_file}: ")
    for given in (str(tmp_path), str(tmp_path / "*.safetensors")):
        assert main(["check", given, "--model", str(model)]) == 1
        assert capsys.readouterr().out.count(f"4 of 4 layers fit {model}") == 2
    assert main(["inspect", str(tmp_path / "cat*")]) == 2
    assert "no file has such a name" in capsys.readouterr().err


def test_a_file_for_another_model_does_not_end_the_list(
    file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    other = tmp_path / "0.safetensors"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_{x}.weight": mx.ones((2, 2)) for x in ("down", "up")}
    mx.save_safetensors(str(other), tensors)
    assert main(["check", str(other), str(file), "--model", str(model)]) == 2
    said = capsys.readouterr()
    assert said.err == f"error: {other}: an adapter for Stable Diffusion 1 or 2, not for FLUX.1\n"
    assert "4 of 4 layers fit" in said.out


def test_merge(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    other, out = tmp_path / "other.safetensors", tmp_path / "both.safetensors"
    save(other, an_adapter(), "kohya", {"trigger": "tjtoy", "steps": "9"})
    assert main(["merge", f"{file}:0.7", f"{other}:0.3", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == ["4 layers, of rank 8 at most", str(out)]
    both, first, second = load(out, strict=True), load(file), load(other)
    for name, delta in both.modules.items():
        expected = 0.7 * first.modules[name].change.dense() + 0.3 * second.modules[name].change.dense()
        assert mx.allclose(delta.change.dense(), expected, rtol=1e-5, atol=1e-5), name
    assert main(["merge", str(file), str(other), str(out), "--rank", "2"]) == 0
    assert set(load(out).ranks().values()) == {2}


def test_resize(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "small.safetensors"
    assert main(["resize", str(file), str(out), "--rank", "2"]) == 0
    assert "4 layers: " in (said := capsys.readouterr().out)
    assert "% of the energy kept; least in " in said
    assert set(load(out).ranks().values()) == {2}
    assert main(["resize", str(file), str(out), "--rank", "64"]) == 0
    assert "100.00 % of the energy kept" in capsys.readouterr().out


def test_extract(file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The adapter that was worked into a model is found again, from a file and from a whole model."""
    flow = checkpoints.find(str(model)).load_flux(mx.float32)
    adapters = Adapters(flow)
    adapters.add(load(file).part("flux"))
    adapters.fuse()
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    mx.save_safetensors(str(tuned), dict(tree_flatten(flow.parameters())))
    assert main(["extract", str(model), str(tuned), str(out), "--rank", "6"]) == 0
    assert "3 layers: 100.00 % of the energy kept" in capsys.readouterr().out
    found, adapter = load(out, strict=True), load(file).part("flux")
    assert found.modules.keys() == adapter.modules.keys()
    for name, delta in adapter.modules.items():
        assert mx.allclose(found.modules[name].change.dense(), delta.change.dense(), rtol=1e-3, atol=1e-4)
    assert main(["extract", str(model), str(model / "transformer"), str(out)]) == 2
    assert "nothing to extract" in capsys.readouterr().err


def test_what_other_programs_leave_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    whole = Delta(LowRank(mx.ones((2, 64)), mx.ones((HIDDEN, 2)), 2.0), magnitude=mx.ones(HIDDEN))
    save(tmp_path / "a.safetensors", Adapter({"img_in": whole}), "diffusers")
    out = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path / "a.safetensors"), "--to", "kohya", str(out)]) == 0
    (note, last) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: of kohya files diffusers and sd-scripts will leave out")
    assert "outside of the blocks (img_in)" in note
    assert "DoRA scales" in note
    assert last == str(out)
