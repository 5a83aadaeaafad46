"""What the tests of the scripts share: a process without a network, a small model, the script in a call."""

import os
import sys

import pytest

import txt2image

from .. import tiny_pipeline

NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a small model of random weights."""
    return str(tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables for a process that reaches no network and has an empty cache of the Hub."""
    folder = tmp_path_factory.mktemp("no_network")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs txt2image's main function in the test's folder: status, lines of stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["txt2image.py", *map(str, args)])
        status = txt2image.main()
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call
