"""Trains an autoencoder and a flow transformer from nothing, as a config says.

    python -m flux.training.pretrain CONFIG [--validate-pipeline] [--resume]
    python -m flux.training.pretrain --config CONFIG
    mlx.launch -n 2 --backend ring -- python -m flux.training.pretrain CONFIG

A run may be stopped (by Ctrl-C or SIGTERM, which save its state) or killed at any moment; with --resume it
goes on to the result that it would have had. Configs of FluxFlow run as they stand; what of them has no
effect here is said.
"""

import argparse
import sys
from pathlib import Path

from flux.arguments import Parser, on_stop_signals, run_program
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.training.callbacks import Stop, Stopped
from flux.training.pretrain.config import Config, ConfigError
from flux.training.pretrain.run import Run
from flux.training.pretrain.validate import describe, load


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input or a failed training, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Do what the command line asks for; the exit status."""
    arguments = ranks.on_all_ranks(lambda: build_parser().parse_args(sys.argv[1:]))
    try:
        config = load(config_file(arguments), arguments.validate_pipeline)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    if not arguments.validate_pipeline:
        return train(config, arguments.resume, ranks)
    print(*describe(config), sep="\n")
    return 0


def build_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m flux.training.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, nargs="?", help="a YAML, TOML or JSON file")
    add("--config", type=Path, dest="file", metavar="CONFIG", help="the same")
    add(
        *("--generate_diagrams", "--generate-diagrams"),
        action="store_true",
        help="no effect: the graphs are drawn with every checkpoint",
    )
    add("--validate-pipeline", action="store_true", help="check the config and name its faults")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    return parser


def config_file(arguments: argparse.Namespace) -> Path:
    """The file, which is given in one of two ways. FluxError for none and for two."""
    given = [path for path in (arguments.config, arguments.file) if path is not None]
    if len(given) != 1:
        raise FluxError("give one config: CONFIG or --config CONFIG")
    return given[0]


def train(config: Config, resume: bool, ranks: Ranks) -> int:
    """Run all steps; the exit status. A signal ends it with its state saved."""
    stop = Stop(ranks)
    with ranks.waiting(None), on_stop_signals(stop.ask):
        run = Run(config, resume, stop=stop)
        try:
            result, status = str(run.execute()), 0
        except Stopped:
            result, status = "stopped; go on with the same command and --resume", 130
        ranks.barrier()  # until rank 0 has written everything
    if ranks.is_rank_zero:
        print(result, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
