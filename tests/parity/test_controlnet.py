"""ControlNets against diffusers' FluxControlNetModel, and what the transformer does with their residuals."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux import sampler
from flux.models.controlnet import ControlNet, spread
from flux.models.transformer import Residuals
from flux.weights import checkpoints, keymaps, shapes

from .. import controlnets
from .test_transformer import DEV, make_inputs, make_ours, make_reference, relative_error

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
SIZE = (4, 6)  # of the picture, in tokens


def inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One call's, but for what controls it."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((*SIZE, 3), np.float32)
    ids[..., 1], ids[..., 2] = np.mgrid[: SIZE[0], : SIZE[1]]
    return {
        "img": rng.standard_normal((batch, math.prod(SIZE), 64)).astype(np.float32),
        "txt": rng.standard_normal((batch, 7, 48)).astype(np.float32),
        "y": rng.standard_normal((batch, 32)).astype(np.float32),
        "timesteps": rng.uniform(0.05, 1, batch).astype(np.float32),
        "guidance": rng.uniform(1, 5, batch).astype(np.float32),
        "img_ids": ids.reshape(1, -1, 3),
        "txt_ids": np.zeros((1, 7, 3), np.float32),
    }


def theirs(network, given: dict, control: np.ndarray, mode: int | None) -> list[list[np.ndarray]]:
    t = {name: torch.tensor(a) for name, a in given.items()}
    with torch.no_grad():
        out = network(
            hidden_states=t["img"],
            controlnet_cond=torch.tensor(control),
            controlnet_mode=None if mode is None else torch.full((len(control), 1), mode),
            encoder_hidden_states=t["txt"],
            pooled_projections=t["y"],
            timestep=t["timesteps"],
            guidance=t["guidance"] if network.config.guidance_embeds else None,
            img_ids=t["img_ids"][0],
            txt_ids=t["txt_ids"][0],
            return_dict=False,
        )
    return [[] if samples is None else [s.numpy() for s in samples] for samples in out]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", controlnets.KINDS)
def test_residuals(kind, batch, tmp_path):
    reference = controlnets.write(tmp_path, kind)
    network = checkpoints.load_part(checkpoints.find_controlnet(str(tmp_path)), mx.float32)
    given, rng = inputs(batch), np.random.default_rng(1)
    mode = 3 if kind == "union" else None
    if kind == "xlabs":
        pixels = rng.uniform(-1, 1, (batch, 16 * SIZE[0], 16 * SIZE[1], 3)).astype(np.float32)
        expected = theirs(reference, given, pixels.transpose(0, 3, 1, 2), mode)
        control = sampler.pack(network.hint(mx.array(pixels)))
    else:
        packed = rng.standard_normal((batch, math.prod(SIZE), 64)).astype(np.float32)
        expected = theirs(reference, given, packed, mode)
        control = mx.array(packed)
    arrays = {name: mx.array(a) for name, a in given.items()}
    made = network(**arrays, control=control, mode=mode)
    for ours, wanted in zip(made, expected, strict=True):
        assert len(ours) == len(wanted)
        for a, b in zip(ours, wanted, strict=True):
            assert a.shape == b.shape
            assert relative_error(np.array(a), b) <= TOLERANCE


def test_all_steps_at_once_are_each_step():
    reference = controlnets.reference("union")
    network = ours_of(reference)
    arrays = {name: mx.array(a) for name, a in inputs(1).items()}
    control = mx.random.normal((1, math.prod(SIZE), 64), key=mx.random.key(1))
    times = mx.array([0.9, 0.4])
    vectors = network.modulation(times, arrays["y"], arrays["guidance"])
    text = network.embed_text(arrays["txt"], 2)
    pe = network.positions(mx.zeros((1, text.shape[1], 3)), arrays["img_ids"])
    embedded = network.embed_control(control)
    mx.eval(vectors, text, embedded)
    network.drop_modulation()
    for step in range(2):
        made = network.residuals(arrays["img"], embedded, text, pe, vectors[step])
        alone = ours_of(reference)(**arrays | {"timesteps": times[step : step + 1]}, control=control, mode=2)
        for a, b in zip(made.double + made.single, alone.double + alone.single, strict=True):
            assert relative_error(np.array(a), np.array(b)) <= 1e-6


def ours_of(reference) -> ControlNet:
    state = {name: mx.array(p.detach().numpy()) for name, p in reference.named_parameters()}
    weights = keymaps.to_ours("controlnet", state)
    network = ControlNet(shapes.params("controlnet", weights, reference.config))
    network.load_weights(list(weights.items()))
    return network


@pytest.mark.parametrize("counts", [(1, 0), (2, 1), (3, 2), (2, 3), (0, 1)])
@pytest.mark.parametrize("repeat", [False, True])
def test_residuals_in_the_transformer(counts, repeat):
    """As diffusers' transformer spreads them; it knows repetition of the double blocks' alone."""
    params = DEV.__class__(**vars(DEV) | {"depth": 3, "depth_single_blocks": 4})
    reference = make_reference(params)
    flow = make_ours(params, reference)
    given = make_inputs(params, 2, 3, 4, 5)
    rng = np.random.default_rng(3)
    double, single = (
        [rng.standard_normal((2, 12, params.hidden_size)).astype(np.float32) for _ in range(n)]
        for n in counts
    )
    with torch.no_grad():
        expected = reference(
            hidden_states=torch.tensor(given.img),
            encoder_hidden_states=torch.tensor(given.txt),
            pooled_projections=torch.tensor(given.y),
            timestep=torch.tensor(given.timesteps),
            img_ids=torch.tensor(given.img_ids[0]),
            txt_ids=torch.tensor(given.txt_ids[0]),
            guidance=torch.tensor(given.guidance),
            controlnet_block_samples=[torch.tensor(a) for a in double] or None,
            controlnet_single_block_samples=[torch.tensor(a) for a in single] or None,
            controlnet_blocks_repeat=repeat,
            return_dict=False,
        )[0].numpy()
    a = {name: mx.array(value) for name, value in vars(given).items()}
    vectors = flow._vectors(flow._silu_vec(a["timesteps"], a["y"], a["guidance"]))
    residuals = Residuals(
        spread([mx.array(r) for r in double], 3, repeat), spread([mx.array(r) for r in single], 4, False)
    )
    pe = flow.positions(a["txt_ids"], a["img_ids"])
    made = flow.denoise(a["img"], flow.embed_text(a["txt"]), pe, vectors, residuals)
    assert relative_error(np.array(made), expected) <= TOLERANCE
    assert relative_error(np.array(flow(**a)), expected) > 0.01


@pytest.mark.parametrize("kind", controlnets.FULL)
def test_names_and_shapes_of_full_size(kind):
    """diffusers' network on its meta device: the map covers every tensor, both ways."""
    with torch.device("meta"):
        reference = diffusers.FluxControlNetModel(**controlnets.FULL[kind])
    state = {name: mx.zeros(p.shape, mx.bfloat16) for name, p in reference.named_parameters()}
    weights = keymaps.to_ours("controlnet", state)
    network = ControlNet(shapes.params("controlnet", weights, reference.config))
    expected = {name: w.shape for name, w in tree_flatten(network.parameters())}
    assert {name: w.shape for name, w in weights.items()} == expected
    back = keymaps.to_file("controlnet", weights, diffusers=True)
    assert {name: w.shape for name, w in back.items()} == {name: w.shape for name, w in state.items()}
    config = controlnets.FULL[kind]
    assert network.params.depth == config["num_layers"]
    assert network.params.modes == config.get("num_mode", 0)
    assert network.params.hint_channels == config.get("conditioning_embedding_channels", 0)
    assert network.params.guidance_embed
