"""`python -m flux.adapters`: look into adapter files, check and convert them, see what they do."""

import argparse
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flux.adapters import Adapter, arithmetic, load, mismatches, read_facts, save
from flux.adapters.adapter import part_of
from flux.adapters.folders import adapter_files
from flux.adapters.report import table
from flux.adapters.writers import WRITERS
from flux.arguments import Parser, adapter, count, run_program
from flux.errors import FluxError
from flux.outputs import check_writable
from flux.weights import checkpoints, layouts

FILES = "adapters: files, folders (all in them), patterns such as 'loras/*dog*', or OWNER/NAME[:FILE]"
ONE_FILE = "an adapter: a file, a folder, or OWNER/NAME[:FILE] of the Hub"
MODELS = "schnell, dev, krea, tiny, a folder, or a repository of the Hub"
NETWORKS = {"flux": "transformer", "clip": "CLIP", "t5": "T5"}


def parser() -> Parser:
    """The program's arguments."""
    main = Parser(prog="python -m flux.adapters", description=__doc__.split(": ", 1)[1])
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="what adapter files hold",
        description="Prints each file's format, its layers with rank and alpha, its metadata, "
        "and every key that is unknown here. Exit status: 2 if a file is no adapter for FLUX.1.",
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    inspect.set_defaults(run=run_inspect)

    check = commands.add_parser(
        "check",
        help="whether adapters fit a model",
        description="Names every unexpected key of a file and every layer that does not fit the "
        "model. Exit status: 0 if all fits, 1 if not, 2 if a file is no adapter for FLUX.1.",
    )
    check.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    check.add_argument("--model", required=True, help=MODELS)
    check.set_defaults(run=run_check)

    convert = commands.add_parser(
        "convert",
        help="write an adapter in another format",
        description="native: loads here and in ComfyUI, holds every kind of adapter. "
        "kohya: sd-scripts' names, for most programs. diffusers: split layers with PEFT's metadata. "
        "ai-toolkit: split layers without it. What a format cannot hold is refused; what other programs will "
        "leave out of the file is said.",
    )
    convert.add_argument("file", type=Path, metavar="FILE", help=ONE_FILE)
    convert.add_argument("--to", required=True, choices=tuple(WRITERS), help="the format to write")
    convert.add_argument("out", type=Path, metavar="OUT", help="the new file, *.safetensors")
    convert.add_argument(
        "--strict",
        action="store_true",
        help="refuse a file with keys that are unknown here, instead of warning",
    )
    convert.set_defaults(run=run_convert)
    add_arithmetic(commands)
    commands.add_parser("grid", help="what adapters do, as one labelled picture: flux.evaluation's command")
    return main


def add_arithmetic(commands: argparse._SubParsersAction) -> None:
    """Add the commands `merge`, `extract` and `resize`."""
    merge = commands.add_parser(
        "merge",
        help="several adapters as one",
        description="Writes the sum of adapters, each with its strength, as one of strength 1. Exact: the "
        "ranks of a layer add up, unless --rank cuts their sum down.",
    )
    merge.add_argument(
        "files", nargs="+", type=adapter, metavar="FILE[:STRENGTH]", help="adapters; strength 1"
    )
    merge.add_argument("out", type=Path, metavar="OUT", help="the new file, *.safetensors")
    merge.add_argument("--rank", type=count, metavar="N", help="of every layer; default: what is exact")
    merge.set_defaults(run=run_merge)

    extract = commands.add_parser(
        "extract",
        help="an adapter from a fine-tuned model",
        description="Writes the LoRA that is nearest to the difference of two transformers, layer by layer, "
        "and says how much of the difference it keeps. Biases and norms that differ are kept whole.",
    )
    model = "its transformer's file, or as --model of txt2image.py"
    extract.add_argument("base", metavar="BASE", help=f"the model that was fine-tuned: {model}")
    extract.add_argument("tuned", metavar="TUNED", help=f"the fine-tuned model: {model}")
    extract.add_argument("out", type=Path, metavar="OUT", help="the new file, *.safetensors")
    extract.add_argument("--rank", type=count, default=32, metavar="N", help="of every layer (default 32)")
    extract.set_defaults(run=run_extract)

    resize = commands.add_parser(
        "resize",
        help="an adapter of another rank",
        description="Writes the LoRA of this rank that is nearest in every layer, and says how much of the "
        "change's energy (its squared singular values) it keeps. Of any kind of adapter that adds a matrix.",
    )
    resize.add_argument("file", type=Path, metavar="IN", help=ONE_FILE)
    resize.add_argument("out", type=Path, metavar="OUT", help="the new file, *.safetensors")
    resize.add_argument("--rank", type=count, required=True, metavar="N", help="of every layer")
    resize.set_defaults(run=run_resize)


def for_each_file(files: list[str], run: Callable[[Path], int]) -> int:
    """Runs a command on every adapter; the worst status. A file that is not an adapter does not end it."""
    worst = 0
    for path in adapter_files(files):
        try:
            worst = max(worst, run(path))
        except FluxError as error:
            print(f"error: {error}", file=sys.stderr)
            worst = 2
    return worst


def run_inspect(options: argparse.Namespace) -> int:
    """Print what files hold; the exit status."""
    return for_each_file(options.files, inspect_one)


def inspect_one(path: Path) -> int:
    """Print what one file holds; the exit status."""
    adapter = load(path)
    print(f"{path}: {adapter.format}")
    for part in adapter.parts():
        layers = adapter.part(part)
        print(f"{NETWORKS[part]}: {len(layers.modules)} layers")
        for line in table(layers):
            print("  " + line)
    for name, value in read_facts(adapter.metadata).items():
        print(f"{name}: {value}")
    if adapter.metadata:
        print("metadata: " + ", ".join(sorted(adapter.metadata)))
    for key in adapter.unexpected:
        print(f"unexpected key: {key}")
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Print what of files does not fit a model; the exit status."""
    checkpoint = checkpoints.find(options.model)
    loaders = {"flux": checkpoint.load_flux, "clip": checkpoint.load_clip, "t5": checkpoint.load_t5}
    networks: dict[str, Any] = {}

    def check_one(path: Path) -> int:
        adapter = load(path)
        wrong: dict[str, str] = {}
        for part in adapter.parts():
            if part not in networks:
                networks[part] = loaders[part]()
            wrong |= mismatches(networks[part], adapter.part(part), widen=True)
        for key in adapter.unexpected:
            print(f"unexpected key: {key}")
        for name, why in wrong.items():
            print(f"does not fit: {name} ({NETWORKS[part_of(name)]}): {why}")
        fitting = sum(name not in wrong for name in adapter.modules)
        print(f"{path}: {fitting} of {len(adapter.modules)} layers fit {options.model}")
        return 1 if wrong or adapter.unexpected else 0

    return for_each_file(options.files, check_one)


def run_convert(options: argparse.Namespace) -> int:
    """Write a file in another format; the exit status."""
    check_out(options.out)
    return write(options.out, load_whole(options.file, options.strict), options.to)


def write(out: Path, adapter: Adapter, format: str = "native", facts: Mapping[str, str] | None = None) -> int:
    """Writes an adapter, and says what other programs leave out of it."""
    if lost := save(out, adapter, format, facts):
        print(f"note: of {format} files {'; '.join(lost)}")
    print(out)
    return 0


def load_whole(file: str | Path, strict: bool = False) -> Adapter:
    """An adapter, with a warning for every key of the file that is left out."""
    adapter = load(checkpoints.find_adapter(str(file)), strict)
    for key in adapter.unexpected:
        print(f"warning: left out, unexpected key: {key}", file=sys.stderr)
    return adapter


def check_out(path: Path) -> None:
    """FluxError where an adapter could not be written there, before the long work."""
    if path.suffix != ".safetensors":
        raise FluxError(f"{path}: the new file's name should end with .safetensors")
    check_writable(path)


def run_merge(options: argparse.Namespace) -> int:
    """Write the sum of adapters; the exit status."""
    check_out(options.out)
    adapters = [(file, load_whole(file), strength) for file, strength in options.files]
    merged = arithmetic.merge(adapters, options.rank)
    facts = [read_facts(each.metadata) for _, each, _ in adapters]
    common = {name: value for name, value in facts[0].items() if all(f.get(name) == value for f in facts)}
    print(f"{len(merged.modules)} layers, of rank {max(merged.ranks().values(), default=0)} at most")
    return write(options.out, merged, facts=common)


def run_extract(options: argparse.Namespace) -> int:
    """Write the difference of two models as an adapter; the exit status."""
    check_out(options.out)
    base, tuned = load_transformer(options.base), load_transformer(options.tuned)
    adapter, energies = arithmetic.extract(base, tuned, options.rank)
    say_kept(energies)
    return write(options.out, adapter, facts={"base_model": Path(options.base).stem})


def load_transformer(model: str) -> nn.Module:
    """A transformer in float32, lazily: of a file, of diffusers' folder for it, or of a whole model."""
    path = Path(model).expanduser()
    if path.is_file() or any(path.glob("diffusion_pytorch_model*.safetensors")):
        return checkpoints.load_part(layouts.part_of_file(path, "transformer"), mx.float32)
    return checkpoints.find(model).load_flux(mx.float32)


def run_resize(options: argparse.Namespace) -> int:
    """Write an adapter of another rank; the exit status."""
    check_out(options.out)
    adapter, energies = arithmetic.resize(load_whole(options.file), options.rank)
    say_kept(energies)
    return write(options.out, adapter)


def say_kept(energies: dict[str, tuple[float, float]]) -> None:
    """Print how much of the energy is kept. energies: layer -> (kept, total)."""
    shares = {name: kept / total for name, (kept, total) in energies.items() if total}
    least = min(shares, key=shares.__getitem__, default=None)
    more = f"; least in {least}: {100 * shares[least]:.2f} %" if least else ""
    print(f"{len(energies)} layers: {100 * arithmetic.share_kept(energies):.2f} % of the energy kept{more}")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; its exit status: 0, 1 where something does not fit, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["grid"]:  # stands above this package, which does not import it
        return runpy.run_module("flux.evaluation")["main"](arguments)
    return run_program(lambda _: run(arguments))


def run(arguments: list[str]) -> int:
    """Run the command that the arguments name; the exit status."""
    options = parser().parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
