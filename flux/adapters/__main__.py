"""`python -m flux.adapters`: look into adapter files, check and convert them, see what they do."""

import argparse
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from flux.adapters import Adapter, load, mismatches, read_facts, save
from flux.adapters.adapter import Dense, Kronecker, LowRank, part_of
from flux.adapters.names import template
from flux.adapters.writers import WRITERS
from flux.errors import FluxError
from flux.weights import checkpoints

NETWORKS = {"flux": "transformer", "clip": "CLIP", "t5": "T5"}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m flux.adapters", description=__doc__.split(": ", 1)[1])
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="what an adapter file holds",
        description="Prints the file's format, its layers with rank and alpha, its metadata, "
        "and every key that is unknown here.",
    )
    inspect.add_argument(
        "file", type=Path, metavar="FILE", help="an adapter: a safetensors file, or a folder"
    )
    inspect.set_defaults(run=run_inspect)

    check = commands.add_parser(
        "check",
        help="whether an adapter fits a model",
        description="Names every key of the file that found no home and every layer that does not fit the "
        "model. Exit status: 0 if all fits, 1 if not.",
    )
    check.add_argument("file", type=Path, metavar="FILE", help="an adapter: a safetensors file, or a folder")
    check.add_argument(
        "--model", required=True, help="schnell, dev, krea, tiny, a folder, or a repository of the Hub"
    )
    check.set_defaults(run=run_check)

    convert = commands.add_parser(
        "convert",
        help="write an adapter in another format",
        description="native: loads here and in ComfyUI, holds every kind of adapter. "
        "kohya: sd-scripts' names, for most programs. diffusers: split layers with PEFT's metadata. "
        "What a format cannot hold is refused.",
    )
    convert.add_argument(
        "file", type=Path, metavar="FILE", help="an adapter: a safetensors file, or a folder"
    )
    convert.add_argument("--to", required=True, choices=tuple(WRITERS), help="the format to write")
    convert.add_argument("out", type=Path, metavar="OUT", help="the new file, *.safetensors")
    convert.add_argument(
        "--strict",
        action="store_true",
        help="refuse a file with keys that are unknown here, instead of warning",
    )
    convert.set_defaults(run=run_convert)
    commands.add_parser("grid", help="what adapters do, as one labelled picture: flux.evaluation's command")
    return main


def run_inspect(options: argparse.Namespace) -> int:
    adapter = load(options.file)
    print(f"{options.file}: {adapter.format}")
    for part in adapter.parts():
        own = adapter.part(part)
        print(f"{NETWORKS[part]}: {len(own.modules)} layers")
        for line in _table(own):
            print("  " + line)
    for name, value in read_facts(adapter.metadata).items():
        print(f"{name}: {value}")
    if adapter.metadata:
        print("metadata: " + ", ".join(sorted(adapter.metadata)))
    for key in adapter.homeless:
        print(f"no home: {key}")
    return 0


def _table(adapter: Adapter) -> list[str]:
    """One line for each kind of layer: its name, how many, what changes it."""
    kinds: dict[tuple[str, str], int] = {}
    for module, delta in adapter.modules.items():
        change = delta.change
        what = {LowRank: "LoRA", Kronecker: "LoKr", Dense: "full matrix"}.get(type(change), "bias alone")
        if isinstance(change, LowRank):
            what = (
                f"{'LoRA' if delta.magnitude is None else 'DoRA'} rank {change.rank} alpha {change.alpha:g}"
            )
        if change is not None and delta.bias is not None:
            what += " with bias"
        key = (template(module), what)
        kinds[key] = kinds.get(key, 0) + 1
    for path in (*adapter.replaced, *adapter.added):
        key = (template(path), "norm")
        kinds[key] = kinds.get(key, 0) + 1
    width = max(len(name) for name, _ in kinds)
    return [f"{name:{width}}  {count:3} x {what}" for (name, what), count in kinds.items()]


def run_check(options: argparse.Namespace) -> int:
    adapter = load(options.file)
    checkpoint = checkpoints.find(options.model)
    loaders: dict[str, Callable] = {
        "flux": checkpoint.load_flux,
        "clip": checkpoint.load_clip,
        "t5": checkpoint.load_t5,
    }
    wrong: dict[str, str] = {}
    for part in adapter.parts():
        wrong |= mismatches(loaders[part](), adapter.part(part))
    for key in adapter.homeless:
        print(f"no home: {key}")
    for name, why in wrong.items():
        print(f"does not fit: {name} ({NETWORKS[part_of(name)]}): {why}")
    fitting = sum(name not in wrong for name in adapter.modules)
    print(f"{options.file}: {fitting} of {len(adapter.modules)} layers fit {options.model}")
    return 1 if wrong or adapter.homeless else 0


def run_convert(options: argparse.Namespace) -> int:
    if options.out.suffix != ".safetensors":
        raise FluxError(f"{options.out}: the new file's name should end with .safetensors")
    adapter = load(options.file, options.strict)
    for key in adapter.homeless:
        print(f"warning: left out, no home: {key}", file=sys.stderr)
    save(options.out, adapter, options.to)
    print(options.out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; its exit status: 0, 1 where something does not fit, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["grid"]:  # stands above this package, which does not import it
        return runpy.run_module("flux.evaluation")["main"](arguments)
    options = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return options.run(options)
    except FluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
