"""Time and peak memory of FLUX's parts, beside diffusers and transformers on the same weights and inputs.

    python -m benchmarks.generation [--size tiny|mid|full-width] [--parts step decode ...] [--json FILE]

Every measurement is a separate process: its peak is the growth of the resident set since the weights' file
was about to be read. The outputs of both programs are compared, so that a fast wrong answer shows.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

import flux  # noqa: F401  (before mlx.core: it puts OpenBLAS into the process)
from benchmarks.measure import in_a_process, peak_memory, show, timed

# hidden: the transformer's width (heads of 128), at `tokens` picture tokens; ch: the autoencoder's width.
SIZES = {
    "tiny": {"hidden": 256, "depth": 1, "single": 2, "tokens": 64, "text": 64, "ch": 32, "side": 64},
    "mid": {"hidden": 768, "depth": 2, "single": 4, "tokens": 1024, "text": 512, "ch": 64, "side": 256},
    "full-width": {
        "hidden": 3072,
        "depth": 1,
        "single": 1,
        "tokens": 1024,
        "text": 512,
        "ch": 128,
        "side": 256,
    },
}
PARTS = ("step", "modulation", "decode", "encode", "t5", "clip")
NETWORK_OF = {"step": "transformer", "modulation": "transformer", "decode": "ae", "encode": "ae"}
PROGRAMS = ("flux", "reference")


def shapes(part: str, size: dict) -> tuple[Any, dict[str, Any]]:
    """The params of the part's network, of that network's class, and the reference's configuration."""
    if part in ("step", "modulation"):
        from flux.models.transformer import FluxParams

        heads = size["hidden"] // 128
        flow = FluxParams(
            hidden_size=size["hidden"],
            num_heads=heads,
            depth=size["depth"],
            depth_single_blocks=size["single"],
            context_in_dim=1024,
        )
        return flow, {
            "num_layers": size["depth"],
            "num_single_layers": size["single"],
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "joint_attention_dim": 1024,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        }
    if part in ("decode", "encode"):
        from flux.models.autoencoder import AutoEncoderParams

        ae = AutoEncoderParams(ch=size["ch"])
        return ae, {
            "block_out_channels": [size["ch"] * m for m in ae.ch_mult],
            "layers_per_block": ae.num_res_blocks,
            "latent_channels": ae.z_channels,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    if part == "t5":
        from flux.models.t5 import T5Params

        t5 = T5Params(d_model=size["hidden"], d_ff=3 * size["hidden"], num_layers=4, num_heads=8)
        names = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv")
        return t5, {name: getattr(t5, name) for name in names} | {"feed_forward_proj": "gated-gelu"}
    from flux.models.clip import CLIPTextParams

    clip = CLIPTextParams()  # CLIP-L is small enough to be measured whole
    return clip, {"eos_token_id": 49407, "bos_token_id": 49406} | {
        name: getattr(clip, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }


def inputs(part: str, size: dict) -> dict[str, np.ndarray]:
    """What the part is given, at random and the same on each call."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    side, tokens = size["side"], size["tokens"]
    if part in ("step", "modulation"):
        ids = np.zeros((tokens, 3), np.float32)
        row = int(tokens**0.5)
        ids[:, 1], ids[:, 2] = np.divmod(np.arange(tokens), row)
        return {
            "img": normal(1, tokens, 64),
            "txt": normal(1, size["text"], 1024),
            "y": normal(1, 768),
            "ids": ids,
        }
    if part == "decode":
        return {"x": normal(1, side // 8, side // 8, 16)}
    if part == "encode":
        return {"x": np.tanh(normal(1, side, side, 3))}
    length, words = (size["text"], 32128) if part == "t5" else (77, 49405)
    ids = rng.integers(3, words, (1, length))
    if part == "clip":
        ids[:, -1] = 49407
    return {"tokens": ids}


# --- Our side ---


def write_weights(part: str, size: dict, folder: Path) -> None:
    """Random weights under the reference's names, for both programs."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from flux.weights import keymaps
    from flux.weights.checkpoints import NETWORKS

    kind = NETWORK_OF.get(part, part)
    mx.random.seed(0)
    weights = dict(tree_flatten(NETWORKS[kind](shapes(part, size)[0]).parameters()))
    mx.save_safetensors(str(folder / "weights.safetensors"), keymaps.to_file(kind, weights, diffusers=True))


def flux_call(part: str, size: dict, folder: Path) -> Callable[[], Any]:
    """A function without arguments that does the part's work once and returns a numpy array."""
    import mlx.core as mx

    from flux.weights import keymaps
    from flux.weights.checkpoints import NETWORKS

    kind = NETWORK_OF.get(part, part)
    network: Any = NETWORKS[kind](shapes(part, size)[0])
    found = cast(dict[str, mx.array], mx.load(str(folder / "weights.safetensors")))
    weights = keymaps.to_ours(kind, found)
    del found
    network.load_weights(list(weights.items()))
    x = {name: mx.array(value) for name, value in np.load(folder / "inputs.npz").items()}
    guidance, time_ = mx.array([3.5]), mx.array([0.7])
    if part == "modulation":
        times = mx.linspace(1, 0.02, 50)
        return lambda: network.modulation(times, x["y"], guidance)[0].final
    if part == "step":
        # What a step costs: the rest is computed once a picture.
        pe = network.positions(mx.zeros((1, size["text"], 3)), x["ids"][None])
        txt = network.embed_text(x["txt"])
        modulation = network.modulation(time_, x["y"], guidance)[0]
        mx.eval(pe, txt, modulation)
        return lambda: network.denoise(x["img"], txt, pe, modulation)
    if part == "decode":
        return lambda: network.decode(x["x"])
    if part == "encode":
        return lambda: network.moments(x["x"])[0]
    if part == "t5":
        return lambda: network(x["tokens"])
    return lambda: network(x["tokens"], 49407).last_hidden_state


# --- The reference's side ---


def reference_call(part: str, size: dict, folder: Path) -> Callable[[], Any]:
    """As `flux_call`, by diffusers or transformers."""
    import torch
    from safetensors.torch import load_file

    config = shapes(part, size)[1]
    network: Any  # diffusers has no types
    if part in ("step", "modulation"):
        from diffusers import FluxTransformer2DModel

        network = FluxTransformer2DModel(**config)
    elif part in ("decode", "encode"):
        from diffusers import AutoencoderKL

        network = AutoencoderKL(**config)
    elif part == "t5":
        from transformers import T5Config, T5EncoderModel

        network = T5EncoderModel(T5Config(**config))
    else:
        from transformers import CLIPTextConfig, CLIPTextModel

        network = CLIPTextModel(CLIPTextConfig(**config))
    weights = load_file(folder / "weights.safetensors")
    if part == "clip":  # transformers 5 has dropped the prefix that checkpoints have
        weights = {name.removeprefix("text_model."): w for name, w in weights.items()}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight"}, missing  # T5's is the same tensor as `shared`
    network.eval()
    x = {name: torch.from_numpy(value) for name, value in np.load(folder / "inputs.npz").items()}
    guidance, time_ = torch.tensor([3.5]), torch.tensor([0.7])
    if part == "step":
        rest = {"img_ids": x["ids"], "txt_ids": torch.zeros(size["text"], 3), "timestep": time_}
        rest |= {"pooled_projections": x["y"], "guidance": guidance, "encoder_hidden_states": x["txt"]}
        return lambda: network(x["img"], **rest).sample
    if part == "decode":
        scaled = x["x"] / 0.3611 + 0.1159
        return lambda: network.decode(scaled.permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
    if part == "encode":
        return lambda: network.encode(x["x"].permute(0, 3, 1, 2)).latent_dist.mean.permute(0, 2, 3, 1)
    return lambda: network(x["tokens"]).last_hidden_state


# --- Measuring ---


def measure(part: str, program: str, size: dict, folder: Path, repeats: int) -> dict[str, float]:
    """In this process: seconds of the fastest of `repeats` calls after a first one, and the peak in bytes."""
    if program == "flux":
        import mlx.core as mx

        import flux.weights.checkpoints  # noqa: F401  (what is imported is not the part's memory)

        evaluate: Callable[[Any], Any] = mx.eval
        numpy: Callable[[Any], np.ndarray] = np.array
    else:
        import diffusers
        import torch
        import transformers  # noqa: F401

        diffusers.utils.logging.set_verbosity_error()
        torch.set_grad_enabled(False)
        evaluate, numpy = (lambda x: x), (lambda x: x.numpy())
    before = peak_memory()
    call = (flux_call if program == "flux" else reference_call)(part, size, folder)
    result, times = timed(call, evaluate, repeats)
    peak = peak_memory() - before
    np.save(folder / f"{program}.npy", numpy(result))
    return times | {"peak": peak}


def run(part: str, size: str, repeats: int) -> dict:
    """Both programs on one part, each in a separate process."""
    row: dict[str, Any] = {"part": part, "size": size}
    arrays: dict[str, Any] = dict(inputs(part, SIZES[size]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "inputs.npz", **arrays)
        write_weights(part, SIZES[size], folder)
        programs = PROGRAMS if find_spec("diffusers") and part != "modulation" else PROGRAMS[:1]
        for program in programs:
            options = ["--size", size, "--measure", part, program, name, "--repeats", repeats]
            row[program] = in_a_process("benchmarks.generation", options)
        if "reference" in row:
            ours, theirs = (np.load(folder / f"{program}.npy") for program in PROGRAMS)
            row["error"] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; the fastest counts (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument(
        "--measure", nargs=3, help=argparse.SUPPRESS
    )  # part, program, folder: one measurement
    args = parser.parse_args()
    if args.measure:
        part, program, folder = args.measure
        print(json.dumps(measure(part, program, SIZES[args.size], Path(folder), args.repeats)))
        return
    print(f"{args.size}: {SIZES[args.size]}, float32, {platform.machine()}, {platform.system()}")
    print(
        f"{'':<11}{'flux':>11}{'peak':>11}{'reference':>14}{'peak':>11}{'time':>10}{'memory':>10}{'error':>12}"
    )
    rows = []
    for part in args.parts:
        rows.append(run(part, args.size, args.repeats))
        print(show(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
