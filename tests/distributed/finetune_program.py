"""What every rank of the tests of fine-tuning runs, in one start: dreambooth.py, command after command.

Arguments: a folder that has a folder for each rank to work in, and dreambooth.py's arguments, a JSON list of
lists. Leaves report0.json, report1.json, ... there: how each command ended and how much it encoded.
"""

import io
import json
import os
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import flux  # noqa: F401  (before mlx.core: it puts OpenBLAS into the process)

# isort: split
import mlx.core as mx

import dreambooth
from flux.data.cache import Latents, Texts
from flux.training.finetune import options


def run(arguments: list[str]) -> tuple[int, str, str, int, int]:
    """Status, output, errors, and the pictures and texts that were encoded by this rank."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["dreambooth.py", *arguments])
    # Each rank has a disk of its own: a path that all have stays as it is, not that of rank 0's folder.
    paths = mock.patch.object(options, "_absolute", str)
    pictures, texts = (
        mock.patch.object(store, "encode", autospec=True, side_effect=store.encode)
        for store in (Latents, Texts)
    )
    shown = redirect_stdout(out), redirect_stderr(err)
    with shown[0], shown[1], warnings.catch_warnings(), argv, paths, pictures as encoded, texts as read:
        status = dreambooth.main()
    return status, out.getvalue(), err.getvalue(), encoded.call_count, read.call_count


def main(folder: Path, commands: list[list[str]]) -> None:
    rank = mx.distributed.init().rank()
    os.chdir(folder / f"rank{rank}")
    ended = [run(arguments) for arguments in commands]
    (folder / f"report{rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
