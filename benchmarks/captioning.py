"""Time and peak memory of the captioner, beside transformers on the same weights and pictures.

    python -m benchmarks.captioning [--size tiny|mid|base] [--batch N] [--beams N] [--tokens N] [--json FILE]

Weights are random, pictures noise. Every measurement is a separate process: its peak is the growth of the
resident set since the weights' file was about to be read. The outputs of both programs are compared: the
features of the vision tower by their distance, the answers token by token.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import flux  # noqa: F401  (before mlx.core: it puts OpenBLAS into the process)
from benchmarks.measure import in_a_process, peak_memory, show, timed

# widths and depths of the vision tower's stages; width and layers of the language model; the picture's side.
SIZES = {
    "tiny": {"embed_dim": (32, 64, 64, 64), "depths": (1, 1, 1, 1), "d_model": 64, "layers": 2, "side": 128},
    "mid": {
        "embed_dim": (64, 128, 256, 512),
        "depths": (1, 1, 3, 1),
        "d_model": 384,
        "layers": 3,
        "side": 384,
    },
    "base": {
        "embed_dim": (128, 256, 512, 1024),
        "depths": (1, 1, 9, 1),
        "d_model": 768,
        "layers": 6,
        "side": 768,
    },
}
PARTS = ("features", "answers")
PROGRAMS = ("flux", "reference")
PROMPT = (0, 2264, 473, 5, 2274, 6190, 116, 2)  # any eight tokens
IMAGE_TOKEN = 51288  # stands for the picture in transformers' input: the last of the vocabulary


def config(size: dict) -> dict:
    """config.json, as transformers and our loader read it."""
    heads = tuple(width // 32 for width in size["embed_dim"])
    text = {f"{part}_layers": size["layers"] for part in ("encoder", "decoder")}
    text |= {f"{part}_attention_heads": size["d_model"] // 64 or 1 for part in ("encoder", "decoder")}
    text |= {f"{part}_ffn_dim": 4 * size["d_model"] for part in ("encoder", "decoder")}
    vision = {
        "embed_dim": size["embed_dim"],
        "depths": size["depths"],
        "num_heads": heads,
        "num_groups": heads,
    }
    return {
        "model_type": "florence2",
        "architectures": ["Florence2ForConditionalGeneration"],
        "image_token_id": IMAGE_TOKEN,
        "vision_config": vision | {"projection_dim": size["d_model"]},
        "text_config": text | {"model_type": "bart", "vocab_size": 51289, "d_model": size["d_model"]},
    }


def write(size: dict, batch: int, folder: Path) -> None:
    """A checkpoint of random weights, and pictures (B, side, side, 3)."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from flux.models.florence2 import Florence2
    from flux.weights import florence2

    (folder / "config.json").write_text(json.dumps(config(size)))
    mx.random.seed(0)
    network = Florence2(florence2.params(florence2.read_json(folder, "config.json")))
    weights = florence2.to_transformers(dict(tree_flatten(network.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    pictures = np.random.default_rng(0).standard_normal((batch, size["side"], size["side"], 3), np.float32)
    np.save(folder / "pictures.npy", pictures)


def settings(options: dict) -> dict:
    """How both programs search; no token ends an answer before it is full."""
    from flux.models.florence2 import GenerationParams

    params = GenerationParams(options["beams"], options["tokens"], eos_token_id=IMAGE_TOKEN)
    return asdict(params) | {"forced_eos_token_id": None, "forced_bos_token_id": None}


def flux_call(part: str, options: dict, folder: Path) -> Callable[[], np.ndarray]:
    """A function without arguments that does the part's work once."""
    import mlx.core as mx

    from flux.models.florence2 import GenerationParams, generate
    from flux.weights import florence2

    network = florence2.load(folder, mx.float32)
    pixels = mx.array(np.load(folder / "pictures.npy"))
    if part == "features":
        return lambda: np.array(network.image_features(pixels))
    tokens = mx.array([PROMPT] * pixels.shape[0])
    params = GenerationParams(**settings(options))
    return lambda: np.array(generate(network, pixels, tokens, params=params))


def reference_call(part: str, options: dict, folder: Path) -> Callable[[], np.ndarray]:
    import torch
    from transformers import Florence2ForConditionalGeneration

    network = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.load(folder / "pictures.npy")).permute(0, 3, 1, 2).contiguous()
    if part == "features":
        return lambda: network.model.get_image_features(pixels).pooler_output.numpy()
    places = 1 + (pixels.shape[-1] // 32) ** 2
    tokens = torch.tensor([[IMAGE_TOKEN] * places + list(PROMPT)] * len(pixels))
    search = settings(options) | {"do_sample": False, "pad_token_id": 1}
    return lambda: network.generate(pixel_values=pixels, input_ids=tokens, **search)[:, 1:].numpy()


def measure(part: str, program: str, options: dict, folder: Path, repeats: int) -> dict[str, float]:
    """In this process: seconds of the fastest of `repeats` calls after a first one, and the peak in bytes."""
    if program == "flux":
        import flux.weights.florence2  # noqa: F401  (what is imported is not the captioner's memory)
    else:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_grad_enabled(False)
    before = peak_memory()
    call = (flux_call if program == "flux" else reference_call)(part, options, folder)
    result, times = timed(call, lambda _: None, repeats)
    peak = peak_memory() - before
    np.save(folder / f"{program}.npy", result)
    return times | {"peak": peak}


def run(part: str, options: dict, repeats: int) -> dict:
    """Both programs on one part, each in a separate process; seconds are those of one picture."""
    row = {"part": part, **options}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(SIZES[options["size"]], options["batch"], folder)
        for program in PROGRAMS if find_spec("transformers") else PROGRAMS[:1]:
            arguments = ["--measure", part, program, name, f"--repeats={repeats}"]
            arguments += [f"--{key}={value}" for key, value in options.items()]
            row[program] = in_a_process("benchmarks.captioning", arguments)
            for key in ("seconds", "first"):
                row[program][key] /= options["batch"]
        if "reference" in row:
            ours, theirs = (np.load(folder / f"{program}.npy") for program in PROGRAMS)
            if part == "features":
                row["error"] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            else:
                row["error"] = float(np.mean(ours != theirs))  # the share of tokens that differ
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--batch", type=int, default=2, help="pictures at once (default: 2)")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: 32)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; the fastest counts (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # part, program, folder
    args = parser.parse_args()
    options = {key: getattr(args, key) for key in ("size", "batch", "beams", "tokens")}
    if args.measure:
        part, program, folder = args.measure
        print(json.dumps(measure(part, program, options, Path(folder), args.repeats)))
        return
    print(f"{options}, {SIZES[args.size]}, float32, {platform.machine()}, {platform.system()}")
    names = f"{'a picture':<11}{'flux':>11}{'peak':>11}{'reference':>14}{'peak':>11}"
    print(names + f"{'time':>10}{'memory':>10}{'error':>12}")
    rows = []
    for part in args.parts:
        rows.append(run(part, options, args.repeats))
        print(show(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
