"""What the recipes' command lines have in common."""

from pathlib import Path

from flux.arguments import described


def export_folders(text: str | None) -> tuple[Path, Path]:
    """What the command line of an export names: the folder of the run, and the one to write."""
    parser = described(text)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    return arguments.run, arguments.output
