"""The losses of a step: every option acts, and a gradient reaches what it should and nothing else."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.models.clip import CLIPTextModel, CLIPTextParams
from flux.training.pretrain.batches import Batches, Shard, without_padding
from flux.training.pretrain.config import COMPONENTS, Config, Step
from flux.training.pretrain.datasets import open_dataset
from flux.training.pretrain.losses import Objective, moments, threshold_metrics
from flux.training.pretrain.networks import Networks, Tokenizers, group_of, mapped
from flux.training.schedules import kl_weight
from flux.training.vocabularies import save_clip, train_clip, train_t5

from . import pretraining, tiny

EVERY_MODE = {
    "name": "all",
    "max_steps": 4,
    "train_vae": True,
    "gan_training": True,
    "train_spade": True,
    "train_diff": True,
    "train_text_encoders": True,
    "kl_warmup_steps": 0,
}


@dataclasses.dataclass(frozen=True)
class World:
    """One config with every network, shared by the tests, which never train it."""

    config: Config
    networks: Networks
    tokenizers: Tokenizers

    def batches(self, **options) -> Batches:
        config = dataclasses.replace(self.config, steps=(self.step(**options),))
        source = open_dataset(config.datasets["data"])
        return Batches(config, 0, source, self.tokenizers, Shard())

    def step(self, **options) -> Step:
        off = {name: False for name in EVERY_MODE if isinstance(EVERY_MODE[name], bool)}
        return dataclasses.replace(self.config.steps[0], **{**off, **options})

    def loss(self, number: int = 1, perceptual=None, half: bool = False, **options):
        """Loss, metrics and the gradient by component, of one batch."""
        step = self.step(**options)
        self.networks.train_only(step.trained)
        batch = self.batches(**options)(number)
        objective = Objective(step, perceptual, half, self.tokenizers.clip.eos_token_id)
        function = nn.value_and_grad(self.networks, objective)
        (loss, metrics), gradients = function(self.networks, batch, mx.random.key(number))
        return loss.item(), {n: m.item() for n, m in metrics.items()}, dict(tree_flatten(gradients))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("objectives")
    config = pretraining.config(folder, EVERY_MODE)
    captions = open_dataset(config.datasets["data"]).captions
    save_clip(*train_clip(captions, 20), folder / "clip")
    train_t5(captions, 60, folder / "t5" / "spiece.model")
    tokenizers = Tokenizers(folder / "clip", folder / "t5", 12)
    networks = tiny.randomize(Networks(config, tokenizers), 1)
    return World(config, networks, tokenizers)


VAE = {"train_vae": True}
GAN = {"train_vae": True, "gan_training": True}
FLOW = {"train_diff": True}
MODES = [
    VAE,
    GAN,
    {"gan_training": True},
    {"train_spade": True},
    {"gan_training": True, "train_spade": True},
    {**VAE, "use_lpips": True},
    FLOW,
    {**FLOW, "train_text_encoders": True},
    {**GAN, **FLOW},
]


def difference(x: mx.array, y: mx.array) -> mx.array:
    """A stand-in for LPIPS."""
    return mx.square(x - y).mean(axis=(1, 2, 3)) + 1


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "+".join(mode))
def test_metrics_and_moving_parts_are_those_that_the_validator_knows(world, mode):
    _, metrics, gradients = world.loss(perceptual=difference, **mode)
    step = world.step(**mode)
    assert {"loss", *metrics} == set(threshold_metrics(step))
    moved = {name for name, g in gradients.items() if mx.abs(g).max().item() > 0}
    for component in COMPONENTS:
        prefix = {"encoder": "ae.encoder.", "decoder": "ae.decoder.", "spade": "ae.decoder.spade."}
        prefix = prefix.get(component, component + ".")
        found = {n for n in moved if n.startswith(prefix)}
        if component == "decoder":
            found = {n for n in found if ".spade." not in n}
        assert bool(found) == (component in step.trained), component
    assert {group_of(name) for name in moved} == set(step.groups)


def test_the_adversaries_gradients_are_kept_apart(world):
    """Hinge and R1 do not move the autoencoder, and lambda_adv does not move the discriminator."""
    _, metrics, base = world.loss(**GAN, lambda_adv=0.0)
    _, _, alone = world.loss(**VAE)
    _, _, weighted = world.loss(**GAN, lambda_adv=2.0)
    for name, gradient in base.items():
        if name.startswith("ae."):
            assert mx.allclose(gradient, alone[name], rtol=1e-4, atol=1e-6), name
        else:
            assert mx.array_equal(gradient, weighted[name]), name
    assert not mx.allclose(base["ae.encoder.conv_in.weight"], weighted["ae.encoder.conv_in.weight"])
    assert metrics["discriminator"] > 0


def test_gan_alone_has_no_reconstruction_term_and_still_reaches_the_encoder(world):
    loss, metrics, gradients = world.loss(gan_training=True, kl_beta=0.0)
    assert loss == pytest.approx(0.5 * metrics["generator"] + metrics["discriminator"], rel=1e-5)
    assert "vae" not in metrics
    assert mx.abs(gradients["ae.encoder.conv_in.weight"]).max().item() > 0
    assert world.loss(gan_training=True, kl_beta=0.0, mse_weight=9.0)[0] == loss


def test_the_loss_is_the_sum_that_the_options_say(world):
    options = {
        **GAN,
        "use_lpips": True,
        "kl_beta": 0.3,
        "lambda_adv": 0.7,
        "lambda_lpips": 0.2,
        "r1_gamma": 4.0,
    }
    for number, r1_shard in ((16, 2.0), (17, 0.0)):
        loss, m, _ = world.loss(number, difference, **options)
        expected = m["vae"] + 0.3 * m["kl"] + 0.2 * m["lpips"] + 0.7 * m["generator"] + m["discriminator"]
        assert loss == pytest.approx(expected + r1_shard * m.get("r1", 0), rel=1e-5)
        assert ("r1" in m) == (number == 16)
        assert m["beta"] == pytest.approx(0.3)
        assert m["lpips"] > 1


def test_reconstruction_is_l1_and_weighted_mse(world):
    values = {w: world.loss(**VAE, mse_weight=w)[1] for w in (0.0, 1.0, 3.0)}
    assert values[0.0]["mse"] == values[3.0]["mse"]
    for weight in (1.0, 3.0):
        expected = values[0.0]["vae"] + weight * values[0.0]["mse"]
        assert values[weight]["vae"] == pytest.approx(expected, rel=1e-5)


def test_r1_comes_every_n_batches(world):
    batches = world.batches(**GAN, r1_interval=3)
    assert [batches(step)["r1"] for step in range(7)] == [True, False, False, True, False, False, True]
    assert not any(world.batches(**VAE, r1_interval=1)(step)["r1"] for step in range(3))


def test_instance_noise_changes_what_the_discriminator_sees_and_not_the_reconstruction(world):
    clean, noisy = (world.loss(**GAN, instance_noise_std=std)[1] for std in (0.0, 0.5))
    assert clean["vae"] == noisy["vae"]
    assert abs(clean["discriminator"] - noisy["discriminator"]) > 1e-3
    assert abs(clean["generator"] - noisy["generator"]) > 1e-3


def test_free_bits_hold_the_divergence_up(world):
    plain, held = (world.loss(**VAE, kl_free_bits=bits, kl_beta=1.0)[1]["kl"] for bits in (0.0, 1e3))
    assert plain < 1e3
    assert held == pytest.approx(1e3)
    _, _, gradients = world.loss(**VAE, kl_free_bits=1e3, kl_beta=1.0)
    _, _, without = world.loss(**VAE, kl_beta=0.0)
    assert mx.allclose(gradients["ae.encoder.conv_out.bias"], without["ae.encoder.conv_out.bias"])


def test_kl_warm_up_is_half_a_cosine():
    values = [kl_weight(step, 2.0, 8) for step in (0, 2, 4, 6, 8, 100)]
    assert values == pytest.approx([0, 2 * 0.1464466, 1, 2 * 0.8535534, 2, 2])
    assert kl_weight(0, 2.0, 0) == 2.0


def test_caption_dropout_reaches_the_batch_and_the_loss(world):
    texts = world.batches(**FLOW, cfg_dropout_prob=0.25)
    shares = [text == "" for step in range(200) for text in texts.texts(step)]
    assert 0.2 < np.mean(shares) < 0.3
    assert all(world.batches(**FLOW, cfg_dropout_prob=0.0).texts(0))
    dropped = world.batches(**FLOW, cfg_dropout_prob=1.0)
    assert dropped.texts(0) == [""] * 4
    empty = world.tokenizers.t5.encode("")
    assert np.array(dropped(0)["t5"]).tolist() == [empty] * 4
    with_text, without = (world.loss(**FLOW, cfg_dropout_prob=p)[1]["flow"] for p in (0.0, 1.0))
    assert with_text != without


def test_the_flow_sees_latents_at_the_scale_of_the_parameters(world):
    plain = world.loss(**FLOW)[1]["flow"]
    before = world.networks.ae.params
    world.networks.ae.params = dataclasses.replace(before, scale_factor=10.0)
    try:
        assert world.loss(**FLOW)[1]["flow"] > 2 * plain
    finally:
        world.networks.ae.params = before


def test_time_shift_moves_the_loss(world):
    assert world.loss(**FLOW, time_shift=1.0)[0] != world.loss(**FLOW, time_shift=3.0)[0]


def test_half_precision_computes_in_bfloat16_and_keeps_float32_gradients(world):
    full, _, _ = world.loss(**GAN, **FLOW)
    half, _, gradients = world.loss(**GAN, **FLOW, half=True)
    assert half != full
    assert half == pytest.approx(full, rel=0.05)
    assert {gradient.dtype for gradient in gradients.values()} == {mx.float32}


def test_spade_begins_as_the_plain_decoder_and_then_differs(world):
    z = mx.random.normal((1, 8, 8, 4), key=mx.random.key(0))
    decoder = world.networks.ae.decoder
    modulated = decoder(z)
    with mapped(decoder.spade, mx.zeros_like):
        plain = decoder(z)
    assert not mx.allclose(modulated, plain, atol=1e-2)
    params = world.networks.ae.params
    raw = z / params.scale_factor + params.shift_factor
    assert mx.allclose(world.networks.ae.decode(z), decoder(raw), atol=1e-5)
    fresh = Networks(world.config, world.tokenizers).ae.decoder
    for spades in fresh.spade.layers:
        for spade in spades:
            x = mx.random.normal((1, 16, 16, spade.both.weight.shape[0] // 2))
            assert mx.array_equal(spade(x, z), x)


def test_training_never_goes_in_pieces(world):
    """Pieces are evaluated one by one, which is impossible inside a gradient."""
    networks = world.networks
    assert networks.ae.encoder.mid.attn_1.scores_memory >= 2**32
    assert networks.ae.decoder.mid.attn_1.scores_memory >= 2**32
    x = mx.zeros((1, 16, 16, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            networks.ae, "_in_pieces", lambda part, x, memory, **_: part(x) if memory > 2**60 else None
        )
        assert moments(networks, x)[0].shape == (1, 8, 8, 4)


def test_a_mapped_network_has_its_own_parameters_back(world):
    before = dict(tree_flatten(world.networks.parameters()))
    with mapped(world.networks, mx.zeros_like):
        assert mx.all(world.networks.ae.encoder.conv_in.weight == 0)
    after = dict(tree_flatten(world.networks.parameters()))
    assert all(after[name] is array for name, array in before.items())


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({**VAE, "freeze": ("encoder",)}, {"decoder"}),
        ({**GAN, "freeze": ("decoder",)}, {"encoder", "discriminator"}),
        ({**FLOW, "unfreeze": ("t5",)}, {"flow", "t5"}),
        ({**FLOW, "train_text_encoders": True, "freeze": ("clip",)}, {"flow", "t5"}),
        ({"train_spade": True}, {"spade"}),
        ({"train_spade": True, "unfreeze": ("vae",)}, {"spade", "encoder", "decoder"}),
    ],
)
def test_freeze_and_unfreeze(world, options, trained):
    world.networks.train_only(frozenset(COMPONENTS))  # what an earlier step may have left
    _, _, gradients = world.loss(**options)
    assert world.step(**options).trained == trained
    parts = {
        "spade" if ".spade." in name else name.split(".")[1] if name.startswith("ae.") else name.split(".")[0]
        for name in gradients
    }
    assert parts == trained


def test_clip_reads_the_same_vector_without_the_padding():
    mx.random.seed(0)
    model = CLIPTextModel(
        CLIPTextParams(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
        )
    )
    ids = np.full((3, 77), 29)
    ids[:, 0] = 28
    for row, length in enumerate((3, 9, 14)):
        ids[row, 1:length] = np.arange(1, length)
    short = without_padding(ids, 29)
    assert short.shape == (3, 16)
    assert without_padding(ids[:2], 29).shape == (2, 16)
    assert without_padding(ids[:1], 29).shape == (1, 8)
    vectors = [model(mx.array(each), 29).pooled_output for each in (ids, short)]
    assert mx.allclose(*vectors, atol=1e-6).item()
