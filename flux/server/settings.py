"""What the server is started with: the command line, then the environment, then a file .env."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flux.errors import FluxError
from flux.server.folders import Folders

ROOT = "flux_train"  # the folder in MOUNT_PATH
PROTOCOLS = {"S3": "s3", "GCS": "gcs"}  # CLOUD_STORAGE_TYPE -> fsspec's name
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MB = 2**20


@dataclass(frozen=True)
class Storage:
    """Where results are copied. protocol: fsspec's; path: a bucket and what comes before the names in it."""

    protocol: str
    path: str


@dataclass(frozen=True)
class Settings:
    """hosts: further names that the server is called by. keep_alive: seconds that an idle model stays loaded.

    private_urls: whether pictures may be downloaded from private addresses, too.
    """

    folders: Folders
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    hosts: tuple[str, ...] = ()
    private_urls: bool = False
    model: str = "schnell"
    captioner: str = "base"
    keep_alive: float = 300.0
    storage: Storage | None = None
    max_body: int = 64 * MB
    max_queued: int = 100  # jobs that wait
    max_waiting: int = 16  # requests for pictures that wait


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a .env file: NAME=VALUE lines; # begins a comment, quotes are taken off."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            value = value.strip()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            found[name.strip()] = value[1:-1] if quoted else value.split(" #")[0].rstrip()
    return found


def root_of(environment: Mapping[str, str]) -> Path:
    """The folder that holds all the others: in MOUNT_PATH, or in FS_PATH where that is no cloud's."""
    base = environment.get("MOUNT_PATH") or (
        "" if environment.get("CLOUD_STORAGE_TYPE") else environment.get("FS_PATH")
    )
    return Path(base or os.curdir).expanduser().absolute() / ROOT


def storage_of(environment: Mapping[str, str]) -> Storage | None:
    """Where results are copied; None without CLOUD_STORAGE_TYPE. FluxError for one that is half said."""
    kind, path = environment.get("CLOUD_STORAGE_TYPE"), environment.get("FS_PATH", "")
    if not kind:
        return None
    if kind.upper() not in PROTOCOLS:
        raise FluxError(f"CLOUD_STORAGE_TYPE is {kind!r}; it should be S3 or GCS")
    bucket = path.split("://")[-1].strip("/")
    if not bucket:
        raise FluxError("CLOUD_STORAGE_TYPE needs FS_PATH: the bucket, and a folder in it if you like")
    return Storage(PROTOCOLS[kind.upper()], bucket)


def port_of(environment: Mapping[str, str]) -> int:
    """PORT, 8000 where it is not given. FluxError for what is no port."""
    text = environment.get("PORT") or "8000"
    if not text.isdecimal() or not 0 <= int(text) < 65536:
        raise FluxError(f"PORT is {text!r}; it should be a number from 0 to 65535")
    return int(text)
