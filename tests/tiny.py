"""A tiny FLUX of random weights for tests: real classes, non-zero biases, norms' weights that are not one."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten

from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.models.clip import CLIPTextModel, CLIPTextParams
from flux.models.t5 import T5Encoder, T5Params
from flux.models.transformer import Flux, FluxParams
from flux.tokenizers import byte_letters
from flux.weights import registry
from flux.weights.save import Model

FLUX = FluxParams(
    in_channels=16,
    out_channels=16,
    vec_in_dim=32,
    context_in_dim=48,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 12, 16),
)
AE = AutoEncoderParams(ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=8, scale_factor=0.5)
CLIP = CLIPTextParams(
    hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=514
)
T5 = T5Params(vocab_size=200, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=2)
SPEC = registry.get("dev")


def randomize(network: nn.Module, seed: int) -> nn.Module:
    """Gives every parameter random values; a norm's weights lie about one."""
    rng = np.random.default_rng(seed)
    weights = []
    for name, w in tree_flatten(network.parameters()):
        value = rng.standard_normal(w.shape).astype(np.float32) * (
            0.2 if w.ndim == 1 else w.shape[-1] ** -0.5
        )
        weights.append((name, mx.array(value + (w.ndim == 1 and "bias" not in name))))
    network.load_weights(weights)
    return network


def model(clip_tokenizer: Path, t5_tokenizer: Path, spec: registry.ModelSpec = SPEC) -> Model:
    networks = [Flux(FLUX), AutoEncoder(AE), CLIPTextModel(CLIP), T5Encoder(T5)]
    networks = [randomize(network, seed) for seed, network in enumerate(networks)]
    return Model(*networks, clip_tokenizer, t5_tokenizer, spec)


def write_tokenizers(folder: Path) -> tuple[Path, Path]:
    """CLIP's 256 bytes, bare and at a word's end, and no merges; a T5 vocabulary learnt from a few words."""
    clip, t5 = folder / "tokenizer", folder / "tokenizer_2"
    clip.mkdir(parents=True)
    t5.mkdir()
    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = ", ".join(f"{_quoted(piece)}: {i}" for i, piece in enumerate(pieces))
    (clip / "vocab.json").write_text("{" + vocabulary + "}", encoding="utf-8")
    (clip / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red apple on a blue background", "two green birds"] * 8),
        model_prefix=str(t5 / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (t5 / "spiece.vocab").unlink()
    return clip, t5


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def parameters(network: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same parameters, to the bit and in type."""
    x, y = parameters(a), parameters(b)
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and mx.array_equal(x[k], y[k]) for k in x)
