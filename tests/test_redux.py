"""FLUX.1 Redux: where its files are found, what is said of faulty ones, and what requests may ask for."""

from dataclasses import replace

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline, generation, machine
from flux.conditioning import Edit, Picture
from flux.conditioning.redux import Redux
from flux.errors import FluxError
from flux.metadata import Recipe
from flux.requests import Request
from flux.weights import checkpoints, contents, repositories

from . import redux_files, tiny, tiny_pipeline
from .test_checkpoints import write_raw

PICTURE = Picture.from_array(np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_pipeline.write_checkpoint(folder)
    redux = redux_files.write_diffusers(folder / "redux")
    return FluxPipeline(str(model), dtype=mx.float32, redux=str(redux))


@pytest.fixture
def folder(tmp_path):
    return redux_files.write_diffusers(tmp_path / "redux")


def load(*paths) -> Redux:
    return Redux.load(*map(str, paths), dtype=mx.float32)


def fault(*paths) -> str:
    with pytest.raises(FluxError) as error:
        load(*paths)
    message = str(error.value)
    assert "\n" not in message
    return message


def assert_is_written(redux: Redux) -> None:
    siglip, encoder = redux_files.networks()
    assert tiny.same(redux.siglip, siglip)
    assert tiny.same(redux.encoder, encoder)


# --- Finding and reading ---


def test_diffusers_folder(folder):
    found = load(folder)
    assert_is_written(found)
    assert found.siglip.params == redux_files.SIGLIP
    assert found.pictures.mean == (0.4, 0.5, 0.6)
    assert found(PICTURE).shape == (1, 16, tiny.T5.d_model)
    for part in ("image_embedder", "image_embedder/diffusion_pytorch_model.safetensors"):
        assert load(folder / part).files.siglip == found.files.siglip.absolute()
    assert set(found.files.fingerprints()) == {"FLUX.1 Redux", "SigLIP's vision encoder"}


def test_comfyuis_tree(tmp_path):
    """Without a config the size is that of whole patches, and heads have size 64: here one of 32."""
    path = redux_files.write_comfyui(tmp_path / "models")
    redux_files.save(tmp_path / "models" / "clip_vision" / "clip_vision_g.safetensors", {"a": mx.ones(1)})
    for given in (path, path.parent, tmp_path / "models"):
        found = load(given)
        assert_is_written(found)
        assert (found.siglip.params.image_size, found.siglip.params.num_attention_heads) == (32, 1)
        assert (found.pictures.height, found.pictures.mean) == (32, (0.5, 0.5, 0.5))


def test_siglip_from_elsewhere(folder, tmp_path):
    """A file or a folder, also a whole SigLIP with its text encoder and a nested config."""
    siglip, redux = redux_files.tensors()
    alone = redux_files.save(tmp_path / "alone" / "flux1-redux-dev.safetensors", redux)
    text = {"text_model.encoder.layers.0.mlp.fc1.weight": mx.ones((2, 2)), "logit_scale": mx.ones(1)}
    whole = redux_files.save(tmp_path / "whole" / "model.safetensors", siglip | text)
    config = {"model_type": "siglip", "vision_config": redux_files.CONFIG, "text_config": {}}
    redux_files.write_json(tmp_path / "whole" / "config.json", config)
    redux_files.write_json(tmp_path / "whole" / "preprocessor_config.json", redux_files.PREPROCESSOR)
    for given in (folder, folder / "image_encoder", whole, whole.parent):
        found = load(alone, given)
        assert_is_written(found)
        assert found.siglip.params == redux_files.SIGLIP
        assert found.pictures.mean == (0.4, 0.5, 0.6)
    message = fault(alone)
    assert message.startswith(f"{alone.parent}: no SigLIP's vision encoder (image_encoder/, clip_vision/")
    assert "--siglip FILE" in message


def test_names_without_prefix(folder):
    siglip, _ = redux_files.tensors()
    bare = {name.removeprefix("vision_model."): w for name, w in siglip.items()}
    redux_files.save(folder / "image_encoder" / "model.safetensors", bare)
    assert_is_written(load(folder))


@pytest.mark.parametrize("part", ["siglip", "redux"])
def test_scaled_fp8(part, folder, tmp_path):
    """As ComfyUI's: every matrix in 8 bits with a scale, and a marker."""
    weights = dict(zip(("siglip", "redux"), redux_files.tensors(), strict=True))[part]
    entries = {"scaled_fp8": ("F8_E4M3", (2,), bytes(2))}
    for name, w in weights.items():
        if w.ndim == 2:
            entries[name] = ("F8_E4M3", w.shape, np.array(mx.to_fp8(w / 2)).tobytes())
            scale = name.replace(".weight", ".scale_weight")
            entries[scale] = ("F32", (), np.array(2, np.float32).tobytes())
        else:
            entries[name] = ("F32", w.shape, np.array(w).tobytes())
    entries = {name: entry for name, entry in entries.items() if "head." not in name}
    path = write_raw(tmp_path / "fp8.safetensors", entries)
    found, exact = load(*((folder, path) if part == "siglip" else (path, folder))), load(folder)
    ours, theirs = (tiny.parameters({"siglip": r.siglip, "redux": r.encoder}[part]) for r in (found, exact))
    for name, w in theirs.items():
        assert mx.abs(ours[name] - w).max() <= 0.07 * mx.abs(w).max()


def test_of_several_files_the_choice_is_said(tmp_path):
    path = redux_files.write_comfyui(tmp_path / "models")
    siglip, _ = redux_files.tensors()
    redux_files.save(tmp_path / "models" / "clip_vision" / "another.safetensors", siglip)
    with pytest.warns(UserWarning, match=r"took another\.safetensors for SigLIP's .*, not sigclip_"):
        load(path)


def test_faults_are_named(folder, tmp_path):
    siglip, redux = redux_files.tensors()
    file = folder / "image_encoder" / "model.safetensors"
    del siglip["vision_model.encoder.layers.1.mlp.fc1.bias"]
    redux_files.save(file, siglip | {"vision_model.new.weight": mx.ones(1)})
    message = fault(folder)
    assert message == f"{file}: missing: encoder.layers.1.mlp.fc1.bias; unexpected: new.weight"
    redux_files.save(tmp_path / "r.safetensors", redux | {"redux_down.bias": mx.ones(47)})
    assert "redux_down" in fault(tmp_path / "r.safetensors", folder)
    redux_files.save(tmp_path / "r.safetensors", redux | {"redux_up.bias": mx.full(144, np.nan)})
    redux_files.write_diffusers(tmp_path / "good")
    assert fault(tmp_path / "r.safetensors", tmp_path / "good").endswith(
        "redux_up.bias holds NaN or infinity: damaged, or a training that failed"
    )


def test_files_of_something_else(folder, tmp_path):
    siglip = folder / "image_encoder" / "model.safetensors"
    assert fault(siglip) == f"{siglip}: holds no FLUX.1 Redux, but SigLIP or CLIP's vision encoder"
    redux = folder / "image_embedder" / "diffusion_pytorch_model.safetensors"
    assert fault(folder, redux) == f"{redux}: holds no SigLIP's vision encoder, but FLUX.1 Redux"
    assert "neither a folder nor in the Hub's cache" in fault("no-such/repository")
    assert fault(tmp_path / "no.safetensors").endswith("no such file or folder (for FLUX.1 Redux)")
    assert fault(tmp_path).startswith(f"{tmp_path}: no FLUX.1 Redux (image_embedder/, style_models/")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(redux.read_bytes()[:-7])
    assert "cut short" in fault(cut)
    (folder / "image_embedder" / "diffusion_pytorch_model.safetensors").write_bytes(cut.read_bytes())
    assert "cut short" in fault(folder)
    assert contents.look([siglip]).parts == ()  # its layers are called like CLIP's


def test_widths_that_do_not_fit(folder, tmp_path):
    _, redux = redux_files.tensors()
    narrow = redux | {"redux_up.weight": redux["redux_up.weight"][:, :24]}
    path = redux_files.save(tmp_path / "narrow.safetensors", narrow)
    assert fault(path, folder).endswith(f"gives features 32 wide, {path} takes 24")
    other = {"redux_up.weight": mx.ones((120, 32)), "redux_up.bias": mx.ones(120)}
    other |= {"redux_down.weight": mx.ones((40, 120)), "redux_down.bias": mx.ones(40)}
    path = redux_files.save(tmp_path / "other.safetensors", other)
    model = tiny_pipeline.write_checkpoint(tmp_path)
    with pytest.raises(FluxError, match=rf"{path} gives tokens 40 wide, .*transformer.* takes texts 48 wide"):
        FluxPipeline(str(model), redux=str(path), siglip=str(folder))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("image_encoder/config.json", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide"),
        ("image_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("image_encoder/config.json", {"image_size": 64}, "position_embedding.weight is (16, 32)"),
        ("feature_extractor/preprocessor_config.json", {"size": {"height": 9}}, "for pictures of 9x33"),
        ("feature_extractor/preprocessor_config.json", {"image_std": [0, 1, 1]}, "the latter above 0"),
        ("feature_extractor/preprocessor_config.json", {"resample": 2}, "resample is 2; only 3 is known"),
    ],
)
def test_bad_configs(part, change, words, folder):
    usual = redux_files.CONFIG if "encoder" in part else redux_files.PREPROCESSOR
    redux_files.write_json(folder / part, usual | change)
    assert words in fault(folder)


# --- The Hub ---


@pytest.mark.parametrize(
    ("repository", "patterns"),
    [
        (
            ["flux1-redux-dev.safetensors", "image_embedder/a.safetensors", "image_encoder/b.safetensors"],
            ["image_embedder/*", "image_encoder/*", "feature_extractor/*"],
        ),
        (["README.md", "sig.safetensors", "old/sig.safetensors"], ["sig.safetensors"]),
        (["config.json", "model.safetensors", "spiece.model"], ["config.json", "model.safetensors"]),
    ],
)
def test_what_is_downloaded(repository, patterns, folder, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns, local_files_only):
        asked.append((repo, allow_patterns, local_files_only))
        return folder

    monkeypatch.setattr(checkpoints, "_list_files", lambda repo: dict.fromkeys(repository, 1))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoints.find_files("owner/name", repositories.redux_patterns) == folder
    assert asked == [("owner/name", patterns, False)]


# --- Requests ---


def test_a_variation_needs_no_prompt_and_differs_by_picture_and_strength(flux):
    options = {"seed": 1, "num_steps": 2, "image_size": (48, 32)}
    other = Picture.from_array(PICTURE.pixels[::-1].copy())
    made = [
        flux.generate_images("", redux=redux, **options)
        for redux in ([], [(PICTURE, 1.0)], [(PICTURE, 0.3)], [(other, 1.0)], [(PICTURE, 1), (other, 1)])
    ]
    assert len({picture.tobytes() for picture in made}) == len(made)
    again = flux.generate_images("", redux=[(PICTURE, 1.0)], **options)
    assert np.array_equal(again, made[1])


def test_the_negative_prompt_has_no_pictures(flux):
    """Guidance leads away from the text without the picture: its branch is as long as the text."""
    request = Request("a", redux=((PICTURE, 1.0),), cfg_scale=2.0).resolved(flux)
    conditioning = generation.encode(flux, [request]).conditioning(request)
    length = conditioning.negative.t5.shape[1]
    assert conditioning.positive.t5.shape[1] == length + 16
    blend = Request("a", redux=((PICTURE, 0.5), (PICTURE, 0.5)), redux_blend=True).resolved(flux)
    mixed = generation.encode(flux, [blend]).conditioning(blend).positive
    assert mx.allclose(mixed.t5, conditioning.positive.t5, atol=1e-5)
    assert mx.allclose(mixed.clip, conditioning.positive.clip)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.01, float("nan")])
def test_strengths(strength, flux):
    picture = Picture("cat.png", "0", PICTURE.pixels)
    with pytest.raises(FluxError, match=rf"strength of cat.png .* above 0 and at most 1, not {strength}"):
        Request("a", redux=((picture, strength),)).resolved(flux)


def test_a_pipeline_without_redux(tmp_path):
    tiny.write_tokenizers(tmp_path)
    pipeline = tiny_pipeline.make_pipeline(tmp_path)
    with pytest.raises(FluxError, match=r"a picture needs FLUX\.1 Redux: FluxPipeline\(redux=\.\.\.\)"):
        Request("a", redux=((PICTURE, 1.0),)).resolved(pipeline)


def test_it_leaves_memory_with_the_text_encoders(tmp_path, folder):
    flux = FluxPipeline(str(tiny_pipeline.write_checkpoint(tmp_path)), redux=str(folder))
    flux.generate_images("a", num_steps=1, image_size=(16, 16), redux=[(PICTURE, 1)], keep_models=False)
    assert flux.redux is None


def test_its_tokens_count_for_the_memory(flux, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "require", lambda needed, what: asked.append(needed))
    for count, blend in ((0, False), (1, False), (2, True), (3, False)):
        Request("a", redux=count * ((PICTURE, 1.0),), redux_blend=blend).resolved(flux)
    none, one, blended, three = asked[::2]  # the others are of the steps
    assert none < one == blended < three


def test_a_picture_that_is_changed_is_encoded_once_for_all_variations(flux):
    request = Request("a", edit=Edit(PICTURE), image_size=(32, 32))
    both = [replace(request, redux=redux).resolved(flux).pictures for redux in ((), ((PICTURE, 1.0),))]
    assert both[0] == both[1]


def test_a_recipe_names_its_files():
    recipe = Recipe((), 0, 1, 1, {"redux_model": "r", "siglip": "s"}, pictures={"cat.png": "0"})
    assert recipe.sources() == ["r", "s", "cat.png"]
