"""Results in a bucket, through a real S3 server on loopback; and what the environment and .env say."""

import os
from pathlib import Path

import pytest

from flux.errors import FluxError
from flux.server.settings import Storage, port_of, read_env_file, root_of, storage_of

from .serving import TINY, Process, write_dataset

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def s3():
    """The address of a server that speaks S3."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def test_results_are_copied(s3, tmp_path):
    secrets = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    bucket = boto3.client(
        "s3", endpoint_url=s3, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    bucket.create_bucket(Bucket="team")
    lines = [f"{name}={value}" for name, value in secrets.items()]
    lines += [f'AWS_ENDPOINT_URL="{s3}"', "export FS_PATH=s3://team/flux", "CLOUD_STORAGE_TYPE=S3 # comment"]
    (tmp_path / ".env").write_text("\n".join(lines))
    server = Process(tmp_path)
    try:
        write_dataset(server, "copied", 1)
        run = server.ok("/train", output_name="copied", iterations=1, **TINY)["run_id"]
        captions = server.ok("/jobs", kind="caption", request={"output_name": "copied"})["id"]
        assert "files copied to s3://team/flux" in server.wait(run, "done")["message"]
        server.wait(captions, "done")
    finally:
        server.stop()
    found = {item["Key"]: item["Size"] for item in bucket.list_objects_v2(Bucket="team")["Contents"]}
    adapter = tmp_path / "flux_train/outputs/copied/copied.safetensors"
    assert found["flux/flux_train/outputs/copied/copied.safetensors"] == adapter.stat().st_size
    assert "flux/flux_train/outputs/copied/loss.png" in found
    assert "flux/flux_train/datasets/copied/image0.txt" in found
    assert "flux/flux_train/datasets/copied.toml" in found


def test_the_environment(tmp_path):
    assert root_of({"MOUNT_PATH": "/mnt", "FS_PATH": "/nfs"}) == Path("/mnt/flux_train")
    assert root_of({"FS_PATH": "/nfs"}) == Path("/nfs/flux_train")
    assert root_of({"FS_PATH": "bucket", "CLOUD_STORAGE_TYPE": "GCS"}) == Path(os.getcwd()) / "flux_train"
    assert storage_of({"FS_PATH": "gs://b/c/", "CLOUD_STORAGE_TYPE": "gcs"}) == Storage("gcs", "b/c")
    assert storage_of({"FS_PATH": "/nfs"}) is None
    assert port_of({"PORT": "9000"}) == 9000
    for wrong in ({"CLOUD_STORAGE_TYPE": "S3"}, {"CLOUD_STORAGE_TYPE": "ftp", "FS_PATH": "x"}):
        with pytest.raises(FluxError):
            storage_of(wrong)
    with pytest.raises(FluxError, match="PORT is 'http'"):
        port_of({"PORT": "http"})
    (tmp_path / ".env").write_text("# A=1\nexport B = 'two # words' \nC=3 # three\nD\n\nE=a=b\n")
    assert read_env_file(tmp_path / ".env") == {"B": "two # words", "C": "3", "E": "a=b"}
