"""Teach FLUX a subject from a few pictures: python dreambooth.py --iterations 1200 path/to/dog6."""

import sys
from typing import Any

from flux.arguments import on_stop_signals, run_program
from flux.data import check, samples
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.training.finetune import Options, Stop, Stopped, begin, doubts, finetune, resume
from flux.training.finetune.arguments import build_parser, given_options, to_options
from flux.weights import registry

__all__ = ["build_parser", "main"]


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input or a failed training, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Do what the command line asks for; the exit status."""
    given = ranks.on_all_ranks(lambda: given_options(sys.argv[1:]))
    check_only, folder = given.pop("check_data", False), given.pop("resume", None)
    options = ranks.on_all_ranks(lambda: to_options(given))
    if check_only:
        return ranks.broadcast_result(lambda: check_data(options))
    if folder is None:
        start = begin(ranks.on_all_ranks(lambda: new_run(options)), ranks)
    else:
        start = resume(folder, options, ranks)
    stop = Stop(ranks)
    try:
        with on_stop_signals(stop.ask):
            print(finetune(start, stop=stop).path)
    except Stopped:
        if ranks.is_rank_zero:
            print(f"stopped; go on with: python dreambooth.py --resume {start.folder}", file=sys.stderr)
        return 130
    return 0


def new_run(given: dict[str, Any]) -> Options:
    """The options of a new run."""
    if "data" not in given:
        raise FluxError("no data set; name a folder, a data.toml (--config) or a data set of the Hub")
    return Options(**given)


def check_data(given: dict[str, Any]) -> int:
    """Print everything wrong with the data set; 2 where it cannot be trained on."""
    if "data" not in given:
        raise FluxError("--check-data needs a data set; name a folder, a data.toml or a data set of the Hub")
    options = Options(**given)
    spec = registry.find(options.model) or registry.get("dev")
    dataset = samples.load(options.data, options.with_size(spec.image_size))
    readers = tokenizers(spec)
    report = check.check(dataset, readers)
    report.warnings += doubts.of_trigger(options.trigger, report.captions, readers) if report.captions else []
    print(check.render(report))
    return 2 if report.errors else 0


def tokenizers(spec: registry.ModelSpec) -> dict[str, check.Tokenizer]:
    """Those of the model; all but the built-in one have those that ship with the package."""
    folder = registry.TOKENIZERS_FOLDER if spec.repo else registry.TINY_FOLDER
    t5 = T5Tokenizer.from_folder(folder / "tokenizer_2", spec.t5_length)
    return {"T5": t5, "CLIP": CLIPTokenizer.from_folder(folder / "tokenizer")}


if __name__ == "__main__":
    sys.exit(main())
