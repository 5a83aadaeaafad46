"""Datasets, trainings and pictures over HTTP, with this project's programs: python -m flux.server"""

import os
import sys
from pathlib import Path

import flux  # before mlx.core, so that OpenBLAS is there first
from flux.arguments import Parser, described, finite, run_program
from flux.errors import FluxError
from flux.server.folders import Folders
from flux.server.settings import LOOPBACK, Settings, port_of, read_env_file, root_of, storage_of

PACKAGES = "the server needs more packages: pip install -r requirements-server.txt"
GRACE = 5  # seconds for requests that are at work when the server ends
EPILOG = """The environment, or a file .env in the working folder, may say PORT, MOUNT_PATH (the folder that
flux_train/ with datasets, outputs, models and logs is in), CLOUD_STORAGE_TYPE (S3 or GCS) with FS_PATH (the
bucket that results are copied to), HOST and FLUX_TOKEN. The command line goes before it."""


def build_parser() -> Parser:
    """The program's arguments. What is not given is left to the environment."""
    parser = described(__doc__)
    parser.prog, parser.epilog = "python -m flux.server", EPILOG
    add = parser.add_argument_group("where").add_argument
    add("--host", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", help="default 8000; 0 takes a free one")
    add("--mount-path", metavar="DIR", help="holds flux_train/ with all that is read and written (default .)")

    add = parser.add_argument_group("who may use it").add_argument
    add("--token", help="clients must send this as `Authorization: Bearer TOKEN`")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name that it is called by")
    add("--allow-private-urls", action="store_true", help="download pictures from private addresses, too")

    add = parser.add_argument_group("models").add_argument
    add("--model", default="schnell", help="for pictures (default schnell)")
    add("--captioner", default="base", help="where there is no models/florence2 (default base)")
    add("--keep-alive", type=finite, default=300.0, metavar="SECONDS", help="that an idle model stays "
        "loaded, -1: for ever (default 300)")  # fmt: skip
    add("--version", action="version", version=flux.__version__)
    return parser


def settings() -> Settings:
    """From the command line, the environment and .env."""
    args = build_parser().parse_args()
    for name, value in read_env_file(Path(".env")).items():
        os.environ.setdefault(name, value)  # also for the libraries of clouds
    given = {"PORT": args.port, "MOUNT_PATH": args.mount_path}
    environment = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    return Settings(
        folders=Folders(root_of(environment)),
        host=args.host or environment.get("HOST") or "127.0.0.1",
        port=port_of(environment),
        token=args.token or environment.get("FLUX_TOKEN") or None,
        hosts=tuple(name.lower() for name in args.allow_host),
        private_urls=args.allow_private_urls,
        model=args.model,
        captioner=args.captioner,
        keep_alive=args.keep_alive,
        storage=storage_of(environment),
    )


def run() -> int:
    """Serve until it is stopped; the exit status."""
    found = settings()
    try:
        import uvicorn

        from flux.server.app import create_app
    except ModuleNotFoundError as error:
        raise FluxError(f"{PACKAGES} ({error.name} is missing)") from None
    if found.host not in LOOPBACK and not found.token:
        print("warning: everyone who reaches this address may use the server: --token", file=sys.stderr)
    uvicorn.run(
        create_app(found),
        host=found.host,
        port=found.port,
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_program(lambda _: run()))
