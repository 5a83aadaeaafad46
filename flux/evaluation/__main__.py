"""`python -m flux.evaluation`: see what adapters and models do."""

import argparse
import sys
from pathlib import Path

import flux  # before mlx.core, so that OpenBLAS is there first
from flux import images
from flux.arguments import Parser, finite, run_program, size
from flux.errors import FluxError
from flux.evaluation import clip_similarity
from flux.evaluation.grid import STRENGTHS, grid
from flux.evaluation.grid import read as read_adapters
from flux.pipeline import FluxPipeline
from flux.requests import Request
from flux.weights.quantize import KINDS, report


def parser() -> Parser:
    """The program's arguments."""
    main = Parser(prog="python -m flux.evaluation", description=__doc__.split(": ", 1)[1])
    add_grid(main.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return main


def add_grid(commands: argparse._SubParsersAction) -> None:
    """Add the command `grid`."""
    show = commands.add_parser(
        "grid",
        help="what adapters do, as one labelled picture",
        description="Draws every prompt with every adapter at every strength, from the same noise. "
        "The class prompt names the class but not the trigger: if it shows the subject, that has leaked.",
    )
    add = show.add_argument
    add("--model", required=True, help="schnell, dev, krea, tiny, a folder, or a repository of the Hub")
    add(
        "--adapter",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="adapters; of a folder all its checkpoints, in order",
    )
    add(
        "--strengths", nargs="+", type=finite, default=STRENGTHS, metavar="X", help="default: 0 0.4 0.8 1 1.2"
    )
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="what to show, with the trigger")
    add("--class-prompt", metavar="TEXT", help="what to show without it")
    add(
        "--compare",
        type=Path,
        metavar="DIR",
        help="the subject's pictures: adds how like them each cell is (CLIP-I; fetches CLIP ViT-B/32)",
    )
    add("--seed", nargs="+", type=int, default=[0], metavar="N", help="a row for each (default 0)")
    add("--image-size", type=size, metavar="HxW", help="in pixels; default: the model's")
    add("--steps", type=int, metavar="N", help="denoising steps; default: the model's")
    add("--quantize", choices=KINDS, help="the model to so few bits a weight")
    add("--output", type=Path, default=Path("grid.png"), metavar="FILE", help="*.png (default grid.png)")
    show.set_defaults(run=run_grid)


def run_grid(options: argparse.Namespace) -> int:
    """Draw the grid and write it; the exit status."""
    if options.output.suffix.lower() != ".png":
        raise FluxError(f"{options.output}: the grid's name should end with .png")
    images.check_output(options.output)
    if not all(text.strip() for text in (*options.prompt, options.class_prompt or "-")):
        raise FluxError("a prompt is empty; say what the pictures should show")
    adapters = read_adapters(options.adapter)
    strengths = list(dict.fromkeys(options.strengths))
    seeds = list(dict.fromkeys(options.seed))
    likeness = None if options.compare is None else clip_similarity.to_folder(options.compare)
    pipeline = FluxPipeline(options.model, bits=options.quantize)
    if options.quantize:
        line = report(options.quantize, transformer=pipeline.flow, T5=pipeline.t5)
        print(f"quantized: {line}", file=sys.stderr)
    sampling = Request("", seeds=tuple(seeds), image_size=options.image_size, steps=options.steps)
    picture = grid(pipeline, adapters, options.prompt, options.class_prompt, strengths, sampling, likeness)
    facts = {
        "model": options.model,
        "adapters": "\n".join(map(str, options.adapter)),
        "strengths": " ".join(f"{strength:g}" for strength in strengths),
        "prompts": "\n".join(options.prompt),
        "class_prompt": options.class_prompt or "",
        "seeds": " ".join(map(str, seeds)),
        "made_with": f"flux-mlx {flux.__version__}: python -m flux.adapters grid",
    }
    images.save(options.output, picture, facts)
    print(options.output)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; its exit status: 0, or 2 for bad input."""
    return run_program(lambda _: run(arguments))


def run(arguments: list[str] | None) -> int:
    """Run the command that the arguments name; the exit status."""
    options = parser().parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
