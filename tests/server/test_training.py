"""The documented API of datasets and training, end to end over real HTTP."""

import json

import pytest
from PIL import Image

from flux.tables import parse_toml

from .serving import TINY, picture_server, png, write_dataset


def test_from_urls_to_an_adapter(server):
    pictures = {
        "/a/image1.png": png(seed=1),
        "/b/image2.png": png((70, 64), 2, "RGBA"),
        "/text.png": b"no picture",
    }
    with picture_server(pictures) as address:
        urls = [f"{address}{path}" for path in (*pictures, "/absent.png")]
        answer = server.ok("/download-images", urls=urls, output_name="my_dataset")
    folder = server.root / "datasets" / "my_dataset"
    assert answer["message"] == "Download complete"
    assert list(answer["files"]) == urls
    assert answer["files"][urls[0]] == str(folder / "image1.jpg")
    assert Image.open(folder / "image2.jpg").format == "JPEG"
    assert answer["files"][urls[2]] == "Error: the answer is not a picture"
    assert answer["files"][urls[3]] == "Error: the server answered 404 Not Found"
    assert sorted(path.name for path in folder.iterdir()) == [".sources.json", "image1.jpg", "image2.jpg"]

    answer = server.ok("/caption-images", output_name="my_dataset", trigger_word="sks dog")
    assert answer["message"] == "Captions generated and saved"
    assert sorted(answer["captions"]) == ["image1.jpg", "image2.jpg"]
    assert answer["captions"]["image1.jpg"].startswith("sks dog, ")
    assert (folder / "image1.txt").read_text() == answer["captions"]["image1.jpg"] + "\n"

    answer = server.ok(
        "/create-dataset-config",
        output_name="my_dataset",
        trigger_word="sks dog",
        resolution=64,
        flip_aug=True,
        num_repeats=2,
    )
    toml = server.root / "datasets" / "my_dataset.toml"
    assert answer == {"message": "Dataset config created", "path": str(toml)}
    general = parse_toml(toml.read_text())["general"]
    wanted = {"num_repeats": 2, "resolution": 64, "batch_size": 1, "shuffle_caption": False, "flip_aug": True}
    wanted |= {"caption_extension": ".txt", "keep_tokens": 1, "class_tokens": "sks dog"}
    assert general == wanted

    answer = server.ok(
        "/train", output_name="my_dataset", max_train_epochs=2, learning_rate=8e-4, save_every_n_epochs=1,
        enable_bucket=True, full_bf16=False, progress_prompts=["sks dog"], progress_every=4, **TINY,
    )  # fmt: skip
    assert answer["message"] == "Training started"
    run = answer["run_id"]
    steps, states = set(), []
    with server.http.stream("GET", f"/jobs/{run}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                steps.add(data.get("iteration"))
                states += [data["state"]] if "state" in data else []
    assert states[-1] == "done"
    assert states in (["queued", "running", "done"], ["running", "done"])
    assert {1, 4, 8} <= steps

    status = server.http.get(f"/status/{run}").json()
    assert (status["state"], status["progress"], status["run_id"]) == ("done", 1.0, run)
    assert 0 < status["loss"] < 10
    assert len(status["logs"]) == 10
    assert status["logs"][-1].endswith("my_dataset.safetensors")
    output = server.root / "outputs" / "my_dataset"
    names = sorted(path.name for path in output.glob("*.safetensors"))
    assert names == ["my_dataset-0001.safetensors", "my_dataset-0002.safetensors", "my_dataset.safetensors"]

    files = {file["name"]: file for file in server.http.get("/outputs/my_dataset").json()}
    assert {"loss.png", "events.jsonl", "progress/step00000008.png", *names} <= set(files)
    for file in files.values():
        assert len(server.http.get(file["url"]).raise_for_status().content) == file["bytes"]
    made = {adapter["name"] for adapter in server.http.get("/adapters").json()}
    assert {"my_dataset", "my_dataset/my_dataset-0001"} <= made


def test_captions_are_read_and_corrected(server):
    write_dataset(server, "corrected")
    found = server.http.get("/datasets/corrected").json()
    assert found["pictures"][0]["caption"] == "sks thing, number 0"
    assert server.http.get(found["pictures"][0]["url"]).content == png(seed=0)
    answer = server.http.put(
        "/datasets/corrected/captions/image0.png", json={"caption": " sks thing,\n on grass "}
    )
    assert answer.json() == {"caption": "sks thing, on grass"}
    assert (server.root / "datasets/corrected/image0.txt").read_text() == "sks thing, on grass\n"
    (server.root / "datasets/corrected/train.jsonl").write_text(
        '{"image": "image1.png", "prompt": "as listed"}\n'
    )
    server.http.put("/datasets/corrected/captions/image1.png", json={"caption": "better"}).raise_for_status()
    assert json.loads((server.root / "datasets/corrected/train.jsonl").read_text())["prompt"] == "better"
    assert {"name": "corrected", "pictures": 3, "captioned": 3, "has_config": True} in server.http.get(
        "/datasets"
    ).json()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/train", {"output_name": "nothing"}, 404, "no dataset config nothing"),
        ("/train", {"network_dimm": 4}, 422, "did you mean 'network_dim'"),
        ("/train", {"learning_rate": -1}, 422, "learning_rate"),
        ("/train", {"output_dir": "/tmp/x"}, 422, "output_dir is set by the server"),
        ("/train", {"output-path": "/tmp/x"}, 422, "output_path is set by the server"),
        ("/train", {"more": {"cache_dir": "/tmp/x"}}, 422, "not a table"),
        ("/train", {"instance-data-dir": "/etc"}, 422, "set by the server"),
        ("/train", {"mask_dir": "/etc"}, 422, "mask_dir is set by the server"),
        ("/train", {"pretrained_model": "../../etc/passwd"}, 422, "not a path under models/"),
        ("/train", {"pretrained_model": "absent.sft"}, 404, "no model 'absent.sft'"),
        ("/train", {"ae": "/etc/passwd"}, 422, "not a path under models/"),
        ("/train", {"adapters": ["../x"]}, 422, "not a path under outputs/"),
        ("/train", {"iterations": 3, "epochs": 1}, 422, "not both"),
        ("/create-dataset-config", {"resolution": 65}, 422, "resolution"),
        ("/create-dataset-config", {"num_repeat": 2}, 422, "did you mean 'num_repeats'"),
        ("/create-dataset-config", {"mask_dir": "../../x"}, 422, "not a path under"),
        ("/create-dataset-config", {"conditioning_data_dir": "/etc"}, 422, "not a path under"),
        ("/create-dataset-config", {"output_name": "absent"}, 404, "no dataset absent"),
        ("/caption-images", {"output_name": "absent"}, 404, "no dataset absent"),
        ("/download-images", {"output_name": "../up", "urls": ["http://a/b"]}, 422, "output_name"),
        ("/download-images", {"output_name": "x", "urls": []}, 422, "urls"),
    ],
)
def test_refusals(server, path, body, status, words):
    if not (server.root / "datasets/refused").is_dir():
        write_dataset(server, "refused")
    answer = server.post(path, **{"output_name": "refused", **body})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert answer.json()["error"]["message"] == answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
