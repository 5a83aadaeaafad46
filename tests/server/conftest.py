"""One server for the tests of a module: starting one takes a second."""

import pytest

from .serving import Process


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("server"))
    yield process
    process.stop()
