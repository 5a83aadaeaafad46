"""diffusers' own folders: written by it and read here, written here and read by it, the same numbers."""

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece

from flux.weights import checkpoints, save
from tests import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def randomize(module) -> None:
    """Random biases and norms too: diffusers starts them at zero and one."""
    generator = torch.Generator().manual_seed(len(list(module.parameters())))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else p.shape[-1] ** -0.5))


def write_tokenizer_json(folder: Path) -> None:
    """T5's vocabulary once more in the form that transformers reads without protobuf."""
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = [(vocabulary.id_to_piece(i), vocabulary.get_score(i)) for i in range(len(vocabulary))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    end = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.post_processor = end
    tokenizer.save(str(folder / "tokenizer.json"))


def pipeline(clip_tokenizer: Path, t5_tokenizer: Path, guidance: bool):
    """A tiny random FluxPipeline of diffusers'."""
    levels = 3
    parts = {
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 12, 16),
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=0.7,
            shift_factor=0.2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=514,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=512,
                eos_token_id=513,
            )
        ),
        "text_encoder_2": transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=200,
                d_model=48,
                d_kv=16,
                d_ff=64,
                num_layers=2,
                num_heads=3,
                feed_forward_proj="gated-gelu",
            )
        ),
    }
    for module in parts.values():
        randomize(module.eval())
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(clip_tokenizer)),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(str(t5_tokenizer)),
        **parts,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def theirs(request, tmp_path_factory):
    """diffusers' pipeline and the folder that it wrote, sharded on the way."""
    root = tmp_path_factory.mktemp("diffusers")
    clip_tokenizer, t5_tokenizer = tiny.write_tokenizers(root)
    write_tokenizer_json(t5_tokenizer)
    pipe = pipeline(clip_tokenizer, t5_tokenizer, guidance=request.param)
    pipe.save_pretrained(root / "model", max_shard_size="300KB")
    assert list((root / "model/transformer").glob("*.index.json")), "the shards are part of the test"
    return pipe, root / "model"


def inputs(pipe, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {
        "img": rng.standard_normal((2, 12, 16)),
        "txt": rng.standard_normal((2, 7, 48)),
        "y": rng.standard_normal((2, 32)),
        "timesteps": np.array([0.3, 0.9]),
        "img_ids": np.stack([np.zeros(12), np.arange(12) // 4, np.arange(12) % 4], 1),
        "txt_ids": np.zeros((7, 3)),
    }
    if pipe.transformer.config.guidance_embeds:
        values["guidance"] = np.array([3.5, 1.0])
    return {name: value.astype(np.float32) for name, value in values.items()}


def run_ours(flux, values: dict) -> np.ndarray:
    arrays = {
        name: mx.array(value[None] if name.endswith("ids") else value) for name, value in values.items()
    }
    return np.array(flux(**arrays))


def run_theirs(transformer, values: dict) -> np.ndarray:
    t = {name: torch.from_numpy(value) for name, value in values.items()}
    with torch.no_grad():
        return transformer(
            hidden_states=t["img"],
            encoder_hidden_states=t["txt"],
            pooled_projections=t["y"],
            timestep=t["timesteps"],
            img_ids=t["img_ids"],
            txt_ids=t["txt_ids"],
            guidance=t.get("guidance"),
        ).sample.numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def model_of(found: checkpoints.Checkpoint) -> save.Model:
    networks = [load(mx.float32) for load in (found.load_flux, found.load_ae, found.load_clip, found.load_t5)]
    return save.Model(*networks, found.clip_tokenizer, found.t5_tokenizer, found.spec)


def test_their_folder_loads_here(theirs):
    pipe, folder = theirs
    found = checkpoints.find(str(folder))
    guidance = pipe.transformer.config.guidance_embeds
    assert found.spec.name == ("dev" if guidance else "schnell")
    model = model_of(found)
    assert (model.flux.params.axes_dim, model.flux.params.guidance_embed) == ((4, 12, 16), guidance)
    ae = model.ae.params
    assert (ae.norm_groups, ae.scale_factor, ae.shift_factor, ae.ch_mult) == (8, 0.7, 0.2, (1, 2, 2))
    values = inputs(pipe)
    assert distance(run_ours(model.flux, values), run_theirs(pipe.transformer, values)) < 5e-5


def test_their_text_encoders_and_autoencoder(theirs):
    pipe, folder = theirs
    model = model_of(checkpoints.find(str(folder)))
    tokens = np.array([[512, 5, 9, 300, 513, 513], [512, 7, 513, 513, 513, 513]])
    latent = np.random.default_rng(1).standard_normal((1, 4, 8, 6)).astype(np.float32)
    with torch.no_grad():
        clip = pipe.text_encoder(torch.from_numpy(tokens)).pooler_output.numpy()
        t5 = pipe.text_encoder_2(torch.from_numpy(tokens % 200)).last_hidden_state.numpy()
        raw = torch.from_numpy(latent) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        picture = pipe.vae.decode(raw).sample.permute(0, 2, 3, 1).numpy()
    assert distance(np.array(model.clip(mx.array(tokens), 513).pooled_output), clip) < 1e-5
    assert distance(np.array(model.t5(mx.array(tokens % 200))), t5) < 1e-5
    assert distance(np.array(model.ae.decode(mx.array(latent.transpose(0, 2, 3, 1)))), picture) < 5e-5


def test_rewritten_in_bfl_layout_to_the_bit(theirs, tmp_path):
    _, folder = theirs
    model = model_of(checkpoints.find(str(folder)))
    save.save_bfl(tmp_path / "bfl", model)
    assert (tmp_path / "bfl" / "ae.safetensors").is_file()
    again = model_of(checkpoints.find(str(tmp_path / "bfl")))
    for kind, network in again.networks.items():
        assert network.params == model.networks[kind].params
        assert tiny.same(network, model.networks[kind]), kind


def test_our_folder_loads_there(theirs, tmp_path):
    """Written in float16 here, read by diffusers: every tensor found, the same output, the same token ids."""
    pipe, folder = theirs
    model = model_of(checkpoints.find(str(folder)))
    save.save_diffusers(tmp_path / "ours", model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = diffusers.FluxPipeline.from_pretrained(str(tmp_path / "ours"), torch_dtype=torch.float32)
    assert not [w for w in caught if "not used" in str(w.message) or "newly initialized" in str(w.message)]
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        original, read = getattr(pipe, name).state_dict(), getattr(back, name).state_dict()
        assert original.keys() == read.keys()
        assert all(torch.equal(w.half().float(), read[key]) for key, w in original.items()), name
    assert back.scheduler.config.use_dynamic_shifting == pipe.transformer.config.guidance_embeds
    values = inputs(pipe, seed=2)
    ours = checkpoints.find(str(tmp_path / "ours")).load_flux(mx.float32)
    assert distance(run_ours(ours, values), run_theirs(back.transformer, values)) < 5e-5
    text = "a red apple on a blue background"
    assert (
        back.tokenizer(text, padding="max_length").input_ids[:20]
        == pipe.tokenizer(text, padding="max_length").input_ids[:20]
    )
    assert back.tokenizer_2(text).input_ids == pipe.tokenizer_2(text).input_ids
