"""Checkpoints in an object store on this machine, by s3fs and by HTTP, with the faults that networks and other writers bring."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira
from shira_format.errors import SourceError
from shira_format.storage.paths import resolve_path
from shira_format.storage.places import open_place
from shira_format.storage.safetensors_file import SafetensorsFile

server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(moto|botocore|aiobotocore|werkzeug|s3fs).*"),
]
BUCKET = "models"
CUT = 4000  # bytes of an answer


class Proxy(threading.Thread):
    """Passes on what is said to a server and what it answers; ``cuts`` answers are cut after :data:`CUT` bytes."""

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.cuts = 0
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                far = socket.create_connection(self._server)
                answered = [0]
                for turn in ((near, far, answered, False), (far, near, answered, True)):
                    threading.Thread(target=self._pass_on, args=turn, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answered: list[int], answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1000):
                answered[0] = answered[0] + len(data) if answers else 0
                if answered[0] > CUT and self.cuts > 0:
                    self.cuts -= 1
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def store() -> Iterator[Proxy]:
    """A server like S3, seen by way of a proxy."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    here = Proxy(moto.get_host_and_port())
    yield here
    here.close()
    moto.stop()


@pytest.fixture
def proxy(store: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An empty bucket, to which ``s3://`` leads."""
    options = {"key": "k", "secret": "s", "endpoint_url": store.url, "client_kwargs": {"region_name": "us-east-1"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    filesystem = fsspec.filesystem("s3")
    filesystem.call_s3("create_bucket", Bucket=BUCKET)
    yield store
    store.cuts = 0
    filesystem.invalidate_cache()
    filesystem.rm(BUCKET, recursive=True)


def put(name: str, data: bytes) -> None:
    fsspec.filesystem("s3").call_s3("put_object", Bucket=BUCKET, Key=name, Body=data, ACL="public-read")


def weights(seed: int, move: float = 0.0, size: int = 40) -> dict[str, Any]:
    base, moved = (np.random.default_rng(n) for n in (0, seed))
    return {
        f"layers.{n}.weight": base.standard_normal((size, 50)).astype(np.float32)
        + np.float32(move) * moved.standard_normal((size, 50)).astype(np.float32)
        for n in range(4)
    }


def shards(tensors: dict[str, Any]) -> dict[str, bytes]:
    names = list(tensors)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    files = {file: save({name: tensors[name] for name in found}) for file, found in parts.items()}
    index = {"weight_map": {name: file for file, found in parts.items() for name in found}}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def test_shards(proxy: Proxy) -> None:
    tensors = weights(0)
    for name, data in shards(tensors).items():
        put(f"it/{name}", data)
    for url in (f"s3://{BUCKET}/it", f"s3://{BUCKET}/it/model.safetensors.index.json"):
        checkpoint = open_checkpoint(url)
        assert tensors.keys() == checkpoint.keys()
        for name, array in tensors.items():
            flat = array.reshape(-1)
            assert np.array_equal(array, checkpoint[name])
            assert np.array_equal(flat[7:1234], checkpoint.part(name, 7, 1234))
            assert np.array_equal(flat[[0, 3, 1999]], checkpoint.at(name, np.array([0, 3, 1999])))
    with pytest.raises(SourceError, match=f"^s3://{BUCKET}/other: no such file or folder"):
        open_checkpoint(f"s3://{BUCKET}/other")


def put_tune(folder: Path) -> None:
    for kind, seed, move in (("base", 0, 0.0), ("tuned", 1, 0.1)):
        (folder / kind).mkdir()
        for name, data in shards(weights(seed, move)).items():
            put(f"{kind}/{name}", data)
            (folder / kind / name).write_bytes(data)


def test_a_conversion_writes_the_same_as_from_disk(proxy: Proxy, tmp_path: Path) -> None:
    put_tune(tmp_path)
    full_to_shira(tmp_path / "tuned", tmp_path / "base", tmp_path / "here.st", density=0.05)
    full_to_shira(f"s3://{BUCKET}/tuned", f"s3://{BUCKET}/base", tmp_path / "there.st", density=0.05)
    assert (tmp_path / "here.st").read_bytes() == (tmp_path / "there.st").read_bytes()


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_file_that_is_replaced_during_a_conversion(which: str, proxy: Proxy, tmp_path: Path) -> None:
    put_tune(tmp_path)
    replaced = []

    def replace(_: int) -> None:
        if not replaced:
            for name, data in shards(weights(2, 0.5)).items():  # of the same size
                put(f"{which}/{name}", data)
            replaced.append(which)

    with pytest.raises(
        SourceError, match=rf"^s3://{BUCKET}/{which}/model-\S+: the file has changed since it was opened$"
    ):
        full_to_shira(
            f"s3://{BUCKET}/tuned",
            f"s3://{BUCKET}/base",
            tmp_path / "a.st",
            density=0.05,
            threads=1,
            progress=replace,
        )
    assert replaced
    assert not (tmp_path / "a.st").exists()


@pytest.fixture(params=["s3", "http"])
def address(request: pytest.FixtureRequest, proxy: Proxy) -> str:
    """The same object by two ways."""
    put("w.safetensors", save(weights(0)))
    return f"s3://{BUCKET}/w.safetensors" if request.param == "s3" else f"{proxy.url}/{BUCKET}/w.safetensors"


def test_a_file_that_has_changed(address: str) -> None:
    for data in (save(weights(1, 1.0)), save(weights(1, 1.0, size=60)), save(weights(1, 1.0, size=20))):
        put("w.safetensors", save(weights(0)))
        file = SafetensorsFile(resolve_path(address))
        file.read("layers.0.weight")
        put("w.safetensors", data)
        for start, stop in ((0, 5), (0, file["layers.1.weight"].shape[0])):
            with pytest.raises(SourceError) as caught:
                file.read_part("layers.1.weight", start, stop)
            assert f"{address}: the file has changed since it was opened" == str(caught.value)


def test_a_file_that_was_deleted(address: str) -> None:
    file = SafetensorsFile(resolve_path(address))
    fsspec.filesystem("s3").call_s3("delete_object", Bucket=BUCKET, Key="w.safetensors")
    with pytest.raises(SourceError, match=f"^{address}: no such file or folder"):
        file.read("layers.1.weight")


def test_a_connection_that_is_cut(address: str, proxy: Proxy) -> None:
    """A client tries again, or there is one error; never less, or other, than the file has."""
    file = SafetensorsFile(resolve_path(address))
    proxy.cuts = 1
    try:
        assert np.array_equal(weights(0)["layers.2.weight"], file.read("layers.2.weight"))
    except SourceError as error:
        assert address.startswith("http")
        assert str(error).startswith(f"{address}: ")
        assert "\n" not in str(error)
    assert 0 == proxy.cuts
    assert np.array_equal(weights(0)["layers.2.weight"], file.read("layers.2.weight"))


def test_a_connection_that_is_always_cut(address: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 2)
    file = SafetensorsFile(resolve_path(address))
    proxy.cuts = 1000
    with pytest.raises(SourceError) as caught:
        file.read("layers.2.weight")
    assert str(caught.value).startswith(f"{address}: ")
    assert "\n" not in str(caught.value)
    assert 1000 > proxy.cuts


def test_a_store_that_fails_as_a_checkpoint_is_opened(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filesystems raise errors of their own also when they are asked what is there."""
    path = resolve_path(address)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Response payload is\nnot completed")  # noqa: EM101

    for method in ("info", "isdir", "ls", "isfile"):
        with monkeypatch.context() as patched:
            patched.setattr(path.fs, method, fail)
            try:
                assert len(open_checkpoint(address))
            except SourceError as error:
                assert f"{address}: Response payload is not completed" == str(error)
    monkeypatch.setattr(path.fs, "isdir", fail)
    with pytest.raises(SourceError, match="Response payload is not completed"):
        open_checkpoint(address)


def test_a_server_without_ranges(tmp_path: Path) -> None:
    """It sends the whole file, whatever is asked for."""
    (tmp_path / "w.safetensors").write_bytes(save(weights(0)))

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{http.server_port}/w.safetensors"
        with pytest.raises(
            SourceError, match=rf"^{url}: \d+ bytes came instead of bytes 0 to 8: .* not support ranges$"
        ):
            open_checkpoint(url)
        http.shutdown()
        thread.join()


def test_a_place(proxy: Proxy, tmp_path: Path) -> None:
    place = open_place(f"s3://{BUCKET}/run")
    assert [] == place.names("patches")
    with pytest.raises(FileNotFoundError, match=f"^s3://{BUCKET}/run/index.json: no such file$"):
        place.read("index.json")
    place.create("index.json", b"{}")
    with pytest.raises(FileExistsError, match=f"^s3://{BUCKET}/run/index.json: exists$"):
        place.create("index.json", b"{other}")
    assert b"{}" == place.read("index.json")
    with place.writing("patches/1.st") as path:
        path.write_bytes(b"one")
    assert ["1.st"] == place.names("patches")
    with place.local("patches/1.st") as path:
        shutil.copy(path, tmp_path / "copy")
    assert b"one" == (tmp_path / "copy").read_bytes()
    place.remove("patches/1.st")
    place.remove("patches/1.st")
    assert [] == place.names("patches")
