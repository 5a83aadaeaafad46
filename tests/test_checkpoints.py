"""Checkpoints: every layout loads the same networks to the bit, and every fault has its one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from flux.adapters import read_weighted
from flux.adapters.attach import fingerprint
from flux.errors import FluxError
from flux.models.transformer import Flux
from flux.weights import checkpoints, keymaps, layouts, prefixes, registry, save, tensors
from tests import controlnets, tiny

LOADERS = {"transformer": "load_flux", "ae": "load_ae", "clip": "load_clip", "t5": "load_t5"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> save.Model:
    return tiny.model(*tiny.write_tokenizers(tmp_path_factory.mktemp("tokenizers")))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The model in BFL's layout, to be spoilt."""
    save.save_bfl(tmp_path / "bfl", model)
    return tmp_path / "bfl"


def load_all(checkpoint: checkpoints.Checkpoint, dtype=mx.float32) -> dict:
    return {kind: getattr(checkpoint, name)(dtype) for kind, name in LOADERS.items()}


def assert_is(checkpoint: checkpoints.Checkpoint, model: save.Model) -> None:
    for kind, network in load_all(checkpoint).items():
        assert network.params == model.networks[kind].params, kind
        assert tiny.same(network, model.networks[kind]), kind


def fault(*args, **kwargs) -> str:
    """The one line that finding and loading ends with."""
    with pytest.raises(FluxError) as error:
        load_all(checkpoints.find(*map(str, args), **kwargs))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Layouts ---


@pytest.mark.parametrize("write", [save.save_bfl, save.save_diffusers])
def test_own_layouts(write, model, tmp_path):
    write(tmp_path / "m", model, dtype=None)
    found = checkpoints.find(str(tmp_path / "m"))
    assert_is(found, model)
    assert replace(found.spec, repo="", file="") == replace(model.spec, repo="", file="")
    assert found.load_clip_tokenizer().eos_token_id == 513
    assert found.load_t5_tokenizer(20)(["a red apple"]).shape == (1, 20)


def test_a_transformer_without_guidance(model, tmp_path):
    """schnell's kind, no config, no defaults: the file alone says what it is."""
    flux = tiny.randomize(Flux(replace(tiny.FLUX, guidance_embed=False, depth=1, axes_dim=(4, 14, 14))), 7)
    save.save_bfl(tmp_path / "m", replace(model, flux=flux))
    (tmp_path / "m" / "defaults.json").unlink()
    (tmp_path / "m" / "flux1-dev.safetensors").unlink()
    tensors.save(tmp_path / "m" / "flux1-mine.safetensors", tiny.parameters(flux))
    found = checkpoints.find(str(tmp_path / "m"))
    assert found.spec.name == "schnell"
    assert found.load_flux().params == flux.params
    assert tiny.same(found.load_flux(), flux)


def test_shards(model, tmp_path):
    save.save_diffusers(tmp_path / "m", model, dtype=None)
    for sub, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        file = tmp_path / "m" / sub / f"{stem}.safetensors"
        names = sorted(mx.load(str(file)))
        index = {}
        for i, part in enumerate((names[::2], names[1::2])):
            shard = f"{stem}-0000{i + 1}-of-00002.safetensors"
            all_of_it = mx.load(str(file))
            tensors.save(file.parent / shard, {name: all_of_it[name] for name in part})
            index |= dict.fromkeys(part, shard)
        file.unlink()
        if sub == "transformer":  # the other goes without its index
            Path(f"{file}.index.json").write_text(json.dumps({"weight_map": index}))
    assert_is(checkpoints.find(str(tmp_path / "m")), model)
    shutil.move(tmp_path / "m/transformer" / shard.replace("model", "diffusion_pytorch_model", 1), tmp_path)
    line = fault(tmp_path / "m")
    assert "index.json: lists files that are not there: diffusion_pytorch_model-00002-of-00002" in line


def test_shards_that_hold_the_same_name(model, tmp_path):
    save.save_diffusers(tmp_path / "m", model, dtype=None)
    file = tmp_path / "m/vae/diffusion_pytorch_model.safetensors"
    for i in (1, 2):
        shutil.copy(file, file.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"))
    file.unlink()
    assert "is also in another file of the same folder" in fault(tmp_path / "m")


def comfy(folder: Path, model: save.Model, transformer_in: str) -> Path:
    """ComfyUI's tree, with its names and a stranger beside the transformer."""
    prefixes = {"transformer": "", "ae": "", "clip": "", "t5": ""}
    files = {
        "transformer": f"{transformer_in}/flux1-mine.safetensors",
        "ae": "vae/ae.safetensors",
        "clip": "text_encoders/clip_l.safetensors",
        "t5": "text_encoders/t5xxl_fp16.safetensors",
    }
    if transformer_in == "checkpoints":
        prefixes["transformer"] = "model.diffusion_model."
    for kind, file in files.items():
        own = keymaps.to_file(kind, tiny.parameters(model.networks[kind]), diffusers=False)
        tensors.save(folder / file, {prefixes[kind] + name: w for name, w in own.items()})
    tensors.save(folder / transformer_in / "sdxl.safetensors", {"model.diffusion_model.x": mx.zeros(2)})
    shutil.copytree(model.clip_tokenizer, folder / "tokenizer")
    shutil.copytree(model.t5_tokenizer, folder / "tokenizer_2")
    return folder


@pytest.fixture
def plain(model) -> save.Model:
    """A model whose shape the tensors alone can tell, as the published ones' can: no config is read."""
    flux = tiny.randomize(Flux(replace(tiny.FLUX, axes_dim=(4, 14, 14), vec_in_dim=64)), 8)
    ae_params = checkpoints.AutoEncoder(replace(tiny.AE, ch=32, norm_groups=32, scale_factor=0.3611)).params
    ae = tiny.randomize(checkpoints.AutoEncoder(ae_params), 9)
    clip = tiny.randomize(
        checkpoints.CLIPTextModel(replace(tiny.CLIP, hidden_size=64, num_attention_heads=1)), 10
    )
    return replace(model, flux=flux, ae=ae, clip=clip)


@pytest.mark.parametrize("transformer_in", ["unet", "diffusion_models", "checkpoints"])
def test_comfyui(transformer_in, plain, tmp_path):
    assert_is(checkpoints.find(str(comfy(tmp_path / "c", plain, transformer_in))), plain)


def test_everything_in_one_checkpoint(plain, tmp_path):
    together = {}
    for kind, network in plain.networks.items():
        own = keymaps.to_file(kind, tiny.parameters(network), diffusers=False)
        together |= {prefixes.PREFIXES[kind][0] + name: w for name, w in own.items()}
    tensors.save(tmp_path / "c/checkpoints/all.safetensors", together)
    shutil.copytree(plain.clip_tokenizer, tmp_path / "c/tokenizer")
    shutil.copytree(plain.t5_tokenizer, tmp_path / "c/tokenizer_2")
    assert_is(checkpoints.find(str(tmp_path / "c")), plain)


def test_of_two_transformers_the_choice_is_said(plain, tmp_path):
    folder = comfy(tmp_path / "c", plain, "unet")
    shutil.copy(folder / "unet/flux1-mine.safetensors", folder / "unet/other.safetensors")
    with pytest.warns(UserWarning, match="--transformer FILE takes another") as warned:
        assert_is(checkpoints.find(str(folder)), plain)
    lines = [str(w.message) for w in warned if "took" in str(w.message)]
    assert lines == [
        f"{folder}: took unet/flux1-mine.safetensors for the transformer, not unet/other.safetensors: "
        "it has the usual name; --transformer FILE takes another"
    ]
    assert_is(checkpoints.find(str(folder), transformer=str(folder / "unet/other.safetensors")), plain)


@pytest.mark.parametrize("kind", layouts.PARTS)
def test_one_part_from_elsewhere(kind, model, folder, tmp_path):
    other = tiny.randomize(type(model.networks[kind])(model.networks[kind].params), 99)
    config = {"transformer": save.transformer_config, "ae": save.autoencoder_config}.get(kind)
    config = (
        config(other.params)
        if config
        else json.loads((folder / layouts.FOLDERS[kind] / "config.json").read_text())
    )
    save.save_network(tmp_path / "other.safetensors", kind, other, config)
    found = checkpoints.find(str(folder), **{kind: str(tmp_path / "other.safetensors")})
    for name, network in load_all(found).items():
        assert tiny.same(network, other if name == kind else model.networks[name]), name


# --- Types ---


def test_types(model, folder):
    assert checkpoints.default_dtype() in (mx.float32, mx.bfloat16)
    for dtype in (mx.float16, mx.bfloat16):
        flux = tiny.parameters(checkpoints.find(str(folder)).load_flux(dtype))
        original = tiny.parameters(model.flux)
        assert all(w.dtype == dtype and mx.array_equal(w, original[k].astype(dtype)) for k, w in flux.items())


def test_loading_reads_nothing(folder):
    """Lazy: the weights of a loaded network are on the disk until something asks for them."""
    before = mx.get_active_memory()
    flux = checkpoints.find(str(folder)).load_flux()
    assert mx.get_active_memory() - before < 2**16
    mx.eval(flux.parameters())
    assert mx.get_active_memory() - before > 2**19


def write_raw(path: Path, entries: dict[str, tuple[str, tuple, bytes]]) -> Path:
    """A safetensors file of any types, by hand."""
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def fp8(byte: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The number behind a byte of a small float type, spelled out."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = (byte & (2**mantissa_bits - 1)) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent_bits == 4 and byte & 0x7F == 0x7F:
        return float("nan")
    if exponent_bits == 5 and exponent == 31:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(("dtype", "bits"), [("F8_E4M3", (4, 3)), ("F8_E5M2", (5, 2))])
def test_fp8_is_widened_exactly(dtype, bits, tmp_path):
    beside = np.arange(6, dtype=np.float32)
    entries = {"w": (dtype, (16, 16), bytes(range(256))), "b": ("F32", (6,), beside.tobytes())}
    out = tensors.load([write_raw(tmp_path / "f.safetensors", entries)])
    wanted = np.array([fp8(byte, *bits) for byte in range(256)], np.float32).reshape(16, 16)
    np.testing.assert_array_equal(np.array(out["w"].astype(mx.float32)), wanted)
    assert out["b"].tolist() == beside.tolist()


def test_scaled_fp8(tmp_path):
    scale = np.array(0.5, np.float32).tobytes()
    entries = {
        "x.weight": ("F8_E4M3", (2,), bytes([0x38, 0x40])),  # 1, 2
        "x.scale_weight": ("F32", (), scale),
        "x.scale_input": ("F32", (), scale),
    }
    out = tensors.load([write_raw(tmp_path / "f.safetensors", entries)])
    assert {k: w.tolist() for k, w in out.items()} == {"x.weight": [0.5, 1.0]}


def test_a_transformer_in_fp8(model, folder):
    path = folder / "flux1-dev.safetensors"
    own = tiny.parameters(model.flux)
    coded = {k: mx.to_fp8(w) for k, w in own.items()}
    write_raw(path, {k: ("F8_E4M3", w.shape, np.array(w).tobytes()) for k, w in coded.items()})
    flux = checkpoints.find(str(folder)).load_flux(mx.float32)
    assert all(mx.array_equal(w, mx.from_fp8(coded[k], mx.float32)) for k, w in tiny.parameters(flux).items())


# --- Faults in files ---


def spoil(folder: Path, change) -> Path:
    """Rewrites the transformer's file with its tensors changed in place."""
    path = folder / "flux1-dev.safetensors"
    content, metadata = mx.load(str(path), return_metadata=True)
    change(content)
    mx.eval(content)
    tensors.save(path, content, metadata)
    return path


def test_all_faults_at_once(folder):
    def change(content):
        del content["img_in.weight"], content["double_blocks.1.txt_attn.proj.bias"]
        content["stray.weight"] = mx.zeros((1,))
        content["final_layer.linear.weight"] = mx.zeros((16, 63))
        content["double_blocks.0.img_attn.proj.bias"] = mx.zeros((65,))

    spoil(folder, change)
    line = fault(folder)
    assert line.startswith(f"{folder / 'flux1-dev.safetensors'}: ")
    assert "missing: img_in.weight, double_blocks.1.txt_attn.proj.bias;" in line
    assert "unexpected: stray.weight" in line
    assert "final_layer.linear.weight is (16, 63) and should be (16, 64)" in line
    assert "double_blocks.0.img_attn.proj.bias is (65,) and should be (64,)" in line


def test_very_many_faults_are_counted(folder):
    spoil(folder, lambda content: content.update({f"stray.{i}": mx.zeros(1) for i in range(40)}))
    line = fault(folder)
    assert line.count("stray.") == 12
    assert line.endswith(" and 28 more (40 in all)")


def test_faults_in_the_words_of_the_file(model, tmp_path):
    """A diffusers file is told about under diffusers' names, also where the names are fused here."""
    save.save_diffusers(tmp_path / "m", model)
    for sub, gone in (
        ("transformer", "transformer_blocks.0.attn.to_k.weight"),
        ("vae", "decoder.conv_norm_out.bias"),
    ):
        path = tmp_path / "m" / sub / "diffusion_pytorch_model.safetensors"
        content = mx.load(str(path))
        mx.eval(content)
        del content[gone]
        tensors.save(path, content)
        assert fault(tmp_path / "m") == f"{path}: missing: {gone}"
        save.save_diffusers(tmp_path / "m", model)


@pytest.mark.parametrize(
    "file", ["flux1-dev.safetensors", "ae.safetensors", "text_encoder_2/model.safetensors"]
)
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_cut_short(file, keep, folder):
    path = folder / file
    path.write_bytes(path.read_bytes()[:keep])
    line = fault(folder)
    assert str(path) in line
    assert "cut short" in line


@pytest.mark.parametrize(
    "content",
    [
        b"\x10" + b"\0" * 7 + b"not json at all!",
        (10**15).to_bytes(8, "little") + b"{}",
        b"<html>" * 100,
        b"\2" + b"\0" * 7 + b"[]",
    ],
)
def test_not_safetensors(content, folder):
    (folder / "ae.safetensors").write_bytes(content)
    line = fault(folder)
    assert str(folder / "ae.safetensors") in line
    assert "not a safetensors file" in line


def test_offsets_that_do_not_make_the_shape(folder):
    write_raw(folder / "ae.safetensors", {"w": ("F32", (3,), b"\0" * 8)})
    assert "its header cannot be understood" in fault(folder)


def test_an_unknown_type(folder):
    write_raw(folder / "ae.safetensors", {"w": ("F4", (16,), b"\0" * 8)})
    assert "w has the type F4" in fault(folder)


def test_bad_configs(folder):
    (folder / "text_encoder/config.json").write_text("{")
    assert "text_encoder/config.json: not JSON" in fault(folder)
    (folder / "text_encoder/config.json").write_text('{"hidden_act": "relu"}')
    assert "relu" in fault(folder)
    (folder / "text_encoder/config.json").unlink()
    (folder / "defaults.json").write_text('{"stepps": 3}')
    assert "defaults.json" in fault(folder)


# --- Faults in finding ---


def test_a_folder_named_like_a_repository(folder, model, monkeypatch, tmp_path):
    """A clone of a repository, reached by the same path, is read where it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "black-forest-labs").mkdir()
    folder.rename(tmp_path / "black-forest-labs/FLUX.1-dev")
    assert_is(checkpoints.find("black-forest-labs/FLUX.1-dev"), model)


def test_what_is_not_there(folder, tmp_path):
    assert "neither a model (schnell, dev, krea, fill, canny, depth, kontext, tiny)" in fault("no-such-model")
    assert "no weights here" in fault(tmp_path / "bfl" / "tokenizer")
    assert "use --ae FILE" in fault(folder / "ae.safetensors")
    assert "no such file (for the autoencoder)" in fault(folder, ae=str(tmp_path / "absent"))
    with pytest.raises(FluxError, match="no part is called vae"):
        checkpoints.find(str(folder), vae="x")
    (folder / "ae.safetensors").unlink()
    line = fault(folder)
    assert "no autoencoder (ae.safetensors, vae/" in line
    assert "--ae FILE" in line


def test_a_lora_is_no_transformer(folder, model):
    (folder / "flux1-dev.safetensors").unlink()
    lora = {"double_blocks.0.img_attn.qkv.lora_A.weight": mx.zeros((1, 64))}
    tensors.save(folder / "flux1-canny-dev-lora.safetensors", lora)
    assert "no transformer" in fault(folder)


# --- Saving ---


def test_saving_replaces_a_model_and_nothing_else(model, tmp_path):
    save.save_bfl(tmp_path / "m", model)
    other = replace(model, spec=registry.get("schnell"))
    save.save_bfl(tmp_path / "m", other)
    assert checkpoints.find(str(tmp_path / "m")).spec.steps == 4
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("...")
    with pytest.raises(FluxError, match="is not a model"):
        save.save_bfl(tmp_path / "precious", model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "precious"]


def test_a_failed_save_leaves_the_old_one(model, tmp_path):
    save.save_bfl(tmp_path / "m", model)
    bad = replace(model, t5_tokenizer=tmp_path / "absent")
    with pytest.raises(FluxError):
        save.save_diffusers(tmp_path / "m", bad)
    assert_is(checkpoints.find(str(tmp_path / "m")), model)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_old_model_comes_back(model, tmp_path, monkeypatch):
    """The new folder cannot take its place at the very last moment."""
    save.save_bfl(tmp_path / "m", model)
    rename = Path.rename

    def fails_for_new(self, target):
        if self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(FluxError, match="No space left"):
        save.save_bfl(tmp_path / "m", model)
    assert_is(checkpoints.find(str(tmp_path / "m")), model)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_float16_in_the_files(model, tmp_path):
    save.save_diffusers(tmp_path / "m", model)
    flux = checkpoints.find(str(tmp_path / "m")).load_flux(mx.float32)
    original = tiny.parameters(model.flux)
    for name, w in tiny.parameters(flux).items():
        assert mx.array_equal(w, original[name].astype(mx.float16).astype(mx.float32)), name


# --- The Hub ---

BFL_REPO = [
    "README.md",
    "ae.safetensors",
    "flux1-dev.safetensors",
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


class Hub:
    """Stands in for the Hub: what it lists, and what was asked of it."""

    def __init__(self, monkeypatch, files, snapshot: Path, error: Exception | None = None):
        self.asked: list = []
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]

        def model_info(_self, repo, **_):
            self.asked.append(repo)
            if error:
                raise error
            return SimpleNamespace(siblings=siblings)

        def snapshot_download(repo, allow_patterns, local_files_only):
            self.asked.append((allow_patterns, local_files_only))
            return str(snapshot)

        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_only_one_layout_is_downloaded(monkeypatch, folder, model):
    hub = Hub(monkeypatch, dict.fromkeys(BFL_REPO, 1), folder)
    found = checkpoints.find("dev")
    assert hub.asked[0] == "black-forest-labs/FLUX.1-dev"
    patterns, offline = hub.asked[1]
    assert not offline
    wanted = set(huggingface_hub.utils.filter_repo_objects(BFL_REPO, allow_patterns=patterns))
    assert wanted == {
        name for name in BFL_REPO if not name.endswith("README.md") and "diffusion_py" not in name
    }
    assert_is(found, model)


def test_diffusers_layout_where_it_is_the_only_one(monkeypatch, folder):
    files = [name for name in BFL_REPO if name not in ("ae.safetensors", "flux1-dev.safetensors")]
    hub = Hub(monkeypatch, dict.fromkeys(files, 1), folder)
    checkpoints.find("someone/flux", t5=str(folder / "text_encoder_2"))
    wanted = set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=hub.asked[1][0]))
    assert "transformer/diffusion_pytorch_model-00001-of-00003.safetensors" in wanted
    assert "vae/diffusion_pytorch_model.safetensors" in wanted
    assert not any(name.startswith("text_encoder_2/") for name in wanted)  # given by hand


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            GatedRepoError,
            ["gated", "https://huggingface.co/black-forest-labs/FLUX.1-dev", "hf auth login", "tiny"],
        ),
        (RepositoryNotFoundError, ["no repository at https://huggingface.co/black-forest-labs/FLUX.1-dev"]),
    ],
)
def test_the_hub_says_no(error, words, monkeypatch, folder):
    Hub(monkeypatch, {}, folder, error.__new__(error))
    line = fault("black-forest-labs/FLUX.1-dev")
    assert all(word in line for word in words)


def test_a_full_disk(monkeypatch, folder):
    Hub(monkeypatch, dict.fromkeys(BFL_REPO, 10**18), folder)
    line = fault("dev")
    assert "GB free" in line
    assert "HF_HOME" in line

    Hub(monkeypatch, dict.fromkeys(BFL_REPO, 1), folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "the disk is full" in fault("dev")


@pytest.fixture
def cache(monkeypatch, folder, tmp_path) -> Path:
    """A Hub's cache that holds the model as someone/flux; returns the snapshot."""
    repo = tmp_path / "hub" / "models--someone--flux"
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_full_cache_needs_no_network(offline, monkeypatch, cache, model):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert_is(checkpoints.find("someone/flux"), model)
    line = fault("someone/else")
    assert "neither a folder nor in the Hub's cache" in line
    assert ("HF_HUB_OFFLINE=1" if offline == "1" else "cannot be reached") in line
    (cache / "ae.safetensors").unlink()
    line = fault("someone/flux")
    assert "no autoencoder" in line
    assert ("HF_HUB_OFFLINE=1" if offline == "1" else "cannot be reached") in line


# --- One file of a repository; adapters there ---


def snapshots(monkeypatch, snapshot, files):
    """A Hub whose repository lies in `snapshot`."""
    return Hub(monkeypatch, dict.fromkeys(files, 1), snapshot)


def test_one_file_of_a_repository(monkeypatch, plain, tmp_path):
    """Its transformer is that file; the rest is the repository's, and without the network the cache's."""
    snapshot = tmp_path / "snapshot"
    save.save_diffusers(snapshot, plain, dtype=None)
    (snapshot / "defaults.json").unlink()
    other = tiny.randomize(Flux(plain.flux.params), 77)
    tensors.save(snapshot / "sub/flux1-mine.safetensors", tiny.parameters(other))
    files = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*.*")]
    hub = snapshots(monkeypatch, snapshot, files)
    found = checkpoints.find("someone/many:sub/flux1-mine.safetensors")
    assert_is(found, replace(plain, flux=other))
    assert found.spec.name == "dev"
    assert hub.asked[0] == (["sub/flux1-mine.safetensors"], False)
    wanted = set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=hub.asked[2][0]))
    assert "vae/diffusion_pytorch_model.safetensors" in wanted
    assert "transformer/diffusion_pytorch_model.safetensors" not in wanted
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_is(checkpoints.find("someone/many:sub/flux1-mine.safetensors"), replace(plain, flux=other))
    assert_is(
        checkpoints.find(str(snapshot), transformer="someone/many:sub/flux1-mine.safetensors"),
        replace(plain, flux=other),
    )
    line = fault("someone/many:absent.safetensors")
    assert "someone/many has no file absent.safetensors" in line


def test_a_repository_with_several_files(monkeypatch, folder):
    hub = snapshots(monkeypatch, folder, ["a-fp8.safetensors", "b-fp8.gguf", "lora.safetensors", "README.md"])
    line = fault("someone/many")
    assert line == (
        "someone/many: a-fp8.safetensors, b-fp8.gguf there; choose a file with --model someone/many:FILE"
    )
    assert hub.asked == ["someone/many"]  # nothing was downloaded
    snapshots(monkeypatch, folder, ["README.md"])
    assert "no transformer there" in fault("someone/many")


def test_variants_are_not_downloaded_twice(monkeypatch, folder):
    names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
    files = [f"{part}/{name}" for part in ("transformer", "vae") for name in names]
    files += ["text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16-00001-of-00001.safetensors"]
    hub = snapshots(monkeypatch, folder, files)
    checkpoints.find("someone/flux")
    wanted = set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=hub.asked[1][0]))
    assert wanted == {f"{part}/{names[0]}" for part in ("transformer", "vae")} | set(files[4:])


def test_adapters_of_the_hub(monkeypatch, tmp_path):
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": mx.zeros((1, 64))}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors.save(path, lora)
    hub = snapshots(monkeypatch, tmp_path, [path.name, "README.md", "other.safetensors", "x/y.safetensors"])
    assert checkpoints.find_adapter("someone/lora") == tmp_path
    assert hub.asked[1] == ([path.name, "adapter_config.json"], False)
    assert checkpoints.find_adapter(f"someone/lora:{path.name}") == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checkpoints.find_adapter("someone/lora") == tmp_path
    assert checkpoints.find_adapter(str(path)) == path
    assert checkpoints.find_adapter("nowhere.safetensors") == Path("nowhere.safetensors")
    snapshots(monkeypatch, tmp_path, ["a.safetensors", "b.safetensors"])
    with pytest.raises(
        FluxError, match=r"a\.safetensors, b\.safetensors there; choose a file with --adapter"
    ):
        checkpoints.find_adapter("someone/lora")


def test_controlnets_of_the_hub(monkeypatch, tmp_path):
    path = controlnets.write_ours(tmp_path / "diffusion_pytorch_model.safetensors", controlnets.make("xlabs"))
    hub = snapshots(monkeypatch, tmp_path, [path.name, "config.json", "README.md", "images/a.png"])
    assert checkpoints.find_controlnet("someone/net").files == (path,)
    assert hub.asked[1] == ([path.name, "*.safetensors.index.json", "config.json"], False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checkpoints.find_controlnet("someone/net").files == (path,)
    assert checkpoints.find_controlnet(f"someone/net:{path.name}").files == (path,)


def test_the_pipeline_takes_an_adapter_of_the_hub(monkeypatch, plain, folder, tmp_path):
    tensors.save(
        tmp_path / "x/lora.safetensors",
        {
            "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": mx.ones((1, 64)),
            "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": mx.ones((64, 1)),
        },
    )
    snapshots(monkeypatch, tmp_path / "x", ["lora.safetensors"])
    (weighted,) = read_weighted([("someone/lora:lora.safetensors", 0.5)])
    assert (weighted.file, weighted.strength) == ("someone/lora:lora.safetensors", 0.5)
    assert list(weighted.adapter.modules) == ["double_blocks.0.img_attn.proj"]
    same = {fingerprint(file) for file in ("someone/lora:lora.safetensors", tmp_path / "x")}
    assert len(same) == 1  # a folder too
