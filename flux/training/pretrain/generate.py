"""Draws a picture for each prompt of a folder with a model that was trained from scratch.

    python -m flux.training.pretrain.generate --model_checkpoint RUN --text_prompts_path prompts/ \\
        --output_path outputs/ [--use_cfg --guidance_scale 5.0]

RUN is the config's output_path, a model's folder or a file in it. prompts/a.txt becomes outputs/a_gen.webp.
The options are called as those of FluxFlow's program; `txt2image.py --model RUN` has more of them.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from flux import images
from flux.arguments import Parser, count, finite, prompt_files, read_prompt, run_program
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.generation import generate
from flux.pipeline import FluxPipeline
from flux.requests import Request
from flux.tables import Faults, read_file
from flux.training.pretrain.config import read_config
from flux.training.pretrain.networks import Networks
from flux.training.pretrain.prepare import CONFIG, trained_tokenizers
from flux.training.pretrain.previews import NETWORKS, load_networks, pipeline_of

UNUSED = {  # of FluxFlow's program
    "batch_size": "pictures are made one after the other",
    "workers": "prompts are read at once",
    "tokenizer_name": "the model has its vocabularies",
    "text_embedding_dim": "sizes are those of the model",
    "vae_dim": "sizes are those of the model",
    "feature_maps_dim": "sizes are those of the model",
}


def build_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m flux.training.pretrain.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_checkpoint", required=True, metavar="RUN", help="a run's folder, a model's, or a file in it")
    add("--text_prompts_path", required=True, metavar="FOLDER", help="a folder with a .txt for each prompt")
    add("--output_path", default="outputs", metavar="FOLDER", help="where the pictures go (outputs)")
    add("--img_size", type=count, metavar="N", help="side of the pictures; by default the one trained at")
    add("--ddim_steps", type=count, metavar="N", help="steps of a picture; by default the model's")
    add("--use_cfg", action="store_true", help="classifier-free guidance, by --guidance_scale")
    add("--guidance_scale", type=finite, metavar="X", help="1: none; 3 to 9 are usual (1)")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt, one more for each next (0)")
    unused = parser.add_argument_group("no effect")
    for name, reason in UNUSED.items():
        unused.add_argument(f"--{name}", metavar="X", help=reason)
    return parser


def run(ranks: Ranks) -> int:
    """Draw what the command line asks for; the exit status."""
    given = ranks.on_all_ranks(lambda: build_parser().parse_args(sys.argv[1:]))
    say_unused(vars(given))
    paths = prompt_files(given.text_prompts_path)
    folder = Path(given.output_path).expanduser()
    make_folder(folder)
    size = None if given.img_size is None else (given.img_size, given.img_size)
    scale = given.guidance_scale if given.use_cfg and given.guidance_scale is not None else 1.0
    requests = [
        Request(
            read_prompt(path), (given.seed + i,), image_size=size, steps=given.ddim_steps, cfg_scale=scale
        )
        for i, path in enumerate(paths)
    ]
    pictures = generate(load(given.model_checkpoint), requests, ranks, progress=True)
    for path, picture in zip(paths, pictures, strict=False):  # ranks other than 0 get none
        file = folder / f"{path.stem}_gen.webp"
        images.save(file, picture)
        print(file)
    return 0


def say_unused(given: dict[str, Any]) -> None:
    """Warns of options that change nothing."""
    for name, reason in UNUSED.items():
        if given[name] is not None:
            warnings.warn(f"--{name} has no effect: {reason}", stacklevel=2)
    scale = given["guidance_scale"]
    if given["use_cfg"] and scale in (None, 1):
        warnings.warn("--use_cfg has no effect at a --guidance_scale of 1: give one above it", stacklevel=2)
    if scale not in (None, 1) and not given["use_cfg"]:
        warnings.warn(f"--guidance_scale {scale:g} has no effect without --use_cfg", stacklevel=2)


def make_folder(folder: Path) -> None:
    """FluxError where it can neither be found nor made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxError(f"--output_path: {folder} cannot be made: {error.strerror}") from None


def load(checkpoint: str) -> FluxPipeline:
    """The model of a run's folder or file; also one with a SPADE decoder, which FLUX's layout cannot hold.

    FluxFlow's documents name a file in the run's folder that is not there here: the run's model is taken
    then, and a warning says so.
    """
    path = Path(checkpoint).expanduser()
    if not path.exists() and path.suffix == ".safetensors" and (path.parent / CONFIG).is_file():
        warnings.warn(f"{path} is not there: taking the model of the run {path.parent}", stacklevel=2)
        path = path.parent
    folder = path.parent if path.name == NETWORKS else path
    if (folder / NETWORKS).is_file() and (folder / CONFIG).is_file():
        return load_spade(folder)
    return FluxPipeline(str(path))


def load_spade(folder: Path) -> FluxPipeline:
    """The networks of a run as it has trained them."""
    faults = Faults()
    config = read_config(read_file(folder / CONFIG), faults)
    if config is None or faults.lines:
        raise FluxError(f"{folder / CONFIG}: {'; '.join(faults.lines)}")
    if not any(step.train_diff for step in config.steps):
        raise FluxError(
            f"{folder}: an autoencoder alone, no step trained the flow: there is nothing to draw with"
        )
    tokenizers = trained_tokenizers(config, folder)
    networks = Networks(config, tokenizers)
    load_networks(folder / NETWORKS, networks)
    return pipeline_of(config, networks, tokenizers)


if __name__ == "__main__":
    sys.exit(run_program(run))
