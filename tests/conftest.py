"""What all tests share: OpenBLAS before MLX, no network, and the material beside the repository."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

import flux  # noqa: F401  (before any test imports mlx.core: it puts OpenBLAS into the process)

# A shell's `&` has its commands ignore Ctrl-C, and what they start inherits that: tests of it would not end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared/` beside the checkout: real vocabularies and photos. Skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not part of the repository")
    return SHARED
