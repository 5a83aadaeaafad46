"""Results copied to a bucket, through fsspec. Reaches the network."""

from collections.abc import Iterable
from pathlib import Path

from flux.errors import FluxError
from flux.server.settings import ROOT, Storage


def copy(files: Iterable[Path], root: Path, storage: Storage) -> int:
    """Copy files under `root` to the same names under the storage's; how many. FluxError where it refuses."""
    try:
        import fsspec
    except ImportError:
        raise FluxError("CLOUD_STORAGE_TYPE needs `pip install fsspec s3fs` (S3) or `gcsfs` (GCS)") from None
    count = 0
    try:
        system = fsspec.filesystem(storage.protocol, skip_instance_cache=True)
        for file in files:
            system.put_file(str(file), f"{storage.path}/{ROOT}/{file.relative_to(root).as_posix()}")
            count += 1
    except Exception as error:  # of whichever library the protocol has: none of them shares a class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FluxError(f"cannot copy to {storage.protocol}://{storage.path}: {reason}") from None
    return count
