"""The OpenAPI document, held against the server by schemathesis, and what the server says of itself."""

import os
import warnings

import pytest

from flux.server import commands
from flux.server.app import create_app
from flux.server.capabilities import capabilities
from flux.server.folders import Folders
from flux.server.settings import Settings
from flux.training.finetune.arguments import build_parser

from .serving import png

schemathesis = pytest.importorskip("schemathesis")
import hypothesis  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

EXAMPLES = int(os.environ.get("FLUX_TEST_EXAMPLES", "2"))  # of each operation and kind


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folders = Folders(tmp_path_factory.mktemp("app"))
    return create_app(Settings(folders, model="tiny", captioner="tiny"))


def small(case):
    """A request for pictures that is soon answered, with files that are pictures: no schema can ask that."""
    if case.path.endswith("/pictures") and isinstance(case.body, dict) and "files" in case.body:
        case.body["files"] = [png()]
    if case.path.startswith("/v1/images/") and isinstance(case.body, dict):
        case.body |= {"image": png()} if "image" in case.body else {}
        case.body.pop("mask", None)
        case.body.pop("adapters", None)
        for key, value in {"n": 1, "steps": 1, "size": "16x16", "stream": False}.items():
            if key in case.body:
                case.body[key] = value
        case.body |= {"keep_alive": -1} if "prompt" in case.body else {}
    return case


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_document_is_true(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.http.base_url}/openapi.json")
    failures = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
        def holds(case):
            if mode is GenerationMode.NEGATIVE and case.path.endswith("/pictures") and case.method == "POST":
                hypothesis.reject()  # what would be wrong in a form of files, `small` makes right
            small(case).call_and_validate(timeout=60)

        try:
            holds()
        except hypothesis.errors.Unsatisfiable:  # nothing can be wrong in a request without parameters
            continue
        except Exception as error:
            failures.append(f"{operation.label}: {error}")
    assert not failures, "\n\n".join(failures)
    assert server.http.get("/health").json()["queued"] == 0


def test_every_option_of_the_programs_is_shown():
    shown = capabilities()["programs"]
    parser = build_parser()
    wanted = {
        option for action in parser._actions for option in action.option_strings if option.startswith("--")
    }
    assert {option["option"] for option in shown["dreambooth"]} >= wanted
    assert {"txt2image", "dreambooth", "caption"} == set(shown)
    assert next(o for o in shown["dreambooth"] if o["option"] == "--optimizer")["choices"]


def test_every_request_has_an_example(app):
    schemas = app.openapi()["components"]["schemas"]
    for name, table in schemas.items():
        if name.endswith(("Request", "Config")) and name != "AdapterRequest":
            assert table["examples"], name


def test_the_documented_example_is_understood(app, monkeypatch):
    """All of the documented keys of /train, with files in models/."""
    folders = app.state.server.folders
    (folders.datasets / "my_model").mkdir()
    (folders.datasets / "my_model.toml").write_text("[general]\n")
    body = dict(app.openapi()["components"]["schemas"]["TrainRequest"]["examples"][0])
    for key in ("pretrained_model", "clip_l", "t5xxl", "ae"):
        (folders.models / body[key]).write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new, notes = commands.train(folders, body, "run-1")
    assert notes == []
    assert new.options["model"] == str(folders.models / "flux1-dev.sft")
    assert new.options["t5"] == str(folders.models / "t5xxl_fp16.safetensors")
    assert new.options["name"] == "my_model"
    assert new.options["max_train_epochs"] == 5
    without, _ = commands.train(folders, {"output_name": "my_model", "full_bf16": True}, "run-2")
    assert without.options["model"] == new.options["model"]
    assert without.options["ae"] == new.options["ae"]
    assert without.options["dtype"] == "bfloat16"
