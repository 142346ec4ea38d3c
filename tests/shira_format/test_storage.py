"""Where bytes come from: local files with and without ``preadv``, and filesystems of fsspec, by ranges and by threads."""

from __future__ import annotations

import builtins
import json
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save
from upath import UPath

from shira_format._core import system
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import FormatError, SourceError
from shira_format.storage.paths import LocalFile, RemoteFile, Storage, is_file, open_storage, resolve_path
from shira_format.storage.places import open_place
from shira_format.storage.safetensors_file import SafetensorsFile
from tests import models

TENSORS = {f"w{n}": np.random.default_rng(n).standard_normal((5, 7)).astype(np.float32) for n in range(4)}


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The memory of fsspec, empty before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def files() -> dict[str, bytes]:
    """A sharded checkpoint, by the names of its files."""
    found = {f"model-{n}.safetensors": save({name: array}) for n, (name, array) in enumerate(TENSORS.items())}
    index = {"weight_map": {name: f"model-{n}.safetensors" for n, name in enumerate(TENSORS)}}
    return found | {"model.safetensors.index.json": json.dumps(index).encode()}


def check(url: Any) -> None:
    checkpoint = open_checkpoint(url)
    assert TENSORS.keys() == checkpoint.keys()
    for name, array in TENSORS.items():
        assert np.array_equal(array, checkpoint[name])
        assert not checkpoint[name].flags.writeable
        assert array.shape == checkpoint.shape(name)
        assert np.array_equal(array.reshape(-1)[3:9], checkpoint.part(name, 3, 9))
        out = np.zeros(10, np.float32)
        part = checkpoint.part(name, 30, 35, out)
        assert np.shares_memory(part, out)
        assert np.array_equal(array.reshape(-1)[30:35], out[:5])
        assert 0 == checkpoint.part(name, 4, 4).size
    shards = checkpoint.shards
    assert shards is not None
    assert list(shards) == [file.name for file in checkpoint.files]


def put_local(folder: Path) -> str:
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return str(folder)


def put_file(folder: Path) -> str:
    return Path(put_local(folder)).as_uri()


def put_memory(folder: Path) -> str:
    for name, data in files().items():
        fsspec.filesystem("memory").pipe_file(f"/some/model/{name}", data)
    return "memory://some/model"


def put_zip(folder: Path) -> str:
    with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files().items():
            archive.writestr(f"model/{name}", data)
    return f"zip://model::{(folder / 'all.zip').as_uri()}"


@pytest.mark.parametrize("put", [put_local, put_file, put_memory, put_zip])
@pytest.mark.parametrize("name", ["", "/model.safetensors.index.json"])
def test_shards(put: Callable[[Path], str], name: str, tmp_path: Path, memory: MemoryFileSystem) -> None:
    url, *chain = put(tmp_path).partition("::")
    check("".join([url, name, *chain]))


@pytest.mark.parametrize("put", [put_local, put_file, put_memory, put_zip])
def test_a_single_file(put: Callable[[Path], str], tmp_path: Path, memory: MemoryFileSystem) -> None:
    url, *chain = put(tmp_path).partition("::")
    checkpoint = open_checkpoint("".join([url, "/model-2.safetensors", *chain]))
    assert ["w2"] == list(checkpoint)
    assert np.array_equal(TENSORS["w2"], checkpoint["w2"])
    assert ["model-2.safetensors"] == [file.name for file in checkpoint.files]


def test_a_upath_may_be_passed_with_options_of_its_storage(tmp_path: Path, memory: MemoryFileSystem) -> None:
    check(UPath(put_memory(tmp_path)))
    check(UPath(put_file(tmp_path)))
    put_zip(tmp_path)
    check(UPath("zip://model", fo=str(tmp_path / "all.zip")))


def test_files_of_this_machine_stay_local(tmp_path: Path) -> None:
    for url in (str(tmp_path), tmp_path.as_uri(), tmp_path, f"local://{tmp_path.as_posix()}"):
        assert tmp_path == resolve_path(url)
        assert isinstance(resolve_path(url), Path)


@pytest.mark.parametrize(
    "text", [r"C:\model", "C:/model", "c://model", "a::b", "model.st", "./memory://x", "://", "1a://b", "a b://c"]
)
def test_what_is_no_url(text: str) -> None:
    assert Path(text) == resolve_path(text)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://nothing/here", "no such file or folder"),
        ("nonsense://bucket/key", "Unsupported filesystem: 'nonsense'"),
        ("zip://model::/nothing/here.zip", "no such file or folder"),
        ("gopher+x://a", "Unsupported filesystem: 'gopher+x'"),
    ],
)
def test_what_cannot_be_reached_is_named(url: str, reason: str, memory: MemoryFileSystem) -> None:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(url)
    assert f"{url}: {reason}" == str(caught.value)


def test_the_reason_of_a_filesystem_is_passed_on(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Exception):
        """Not an OSError, as those of some clients."""

    def info(self: Any, path: str, **_: Any) -> Any:
        raise Refused("no credentials:\n  log in first")

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "exists", lambda *_, **__: False)
    with pytest.raises(SourceError) as caught:
        open_checkpoint("memory://a/model.safetensors")
    assert "memory://a/model.safetensors: no credentials: log in first" == str(caught.value)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "upath":
            raise ImportError(name)
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SourceError) as caught:
        resolve_path("memory://a")
    assert "memory://a: URLs need fsspec: pip install 'shira-format[remote]'" == str(caught.value)


def test_damaged_files_are_named(memory: MemoryFileSystem) -> None:
    memory.pipe_file("/m/model.safetensors", b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(FormatError) as caught:
        open_checkpoint("memory://m")
    assert str(caught.value).startswith("memory://m/model.safetensors: ")
    assert "file-truncated" == caught.value.rule


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "the shard gone.safetensors is missing"),
        ({"weight_map": {"a": "../a.safetensors"}}, "which is not a file name"),
        ({"weight_map": {"b": "a.safetensors"}}, "the index lists 'b' in a.safetensors, which does not have it"),
    ],
)
def test_a_remote_index_must_tell_the_truth(index: Any, reason: str, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/m/model.safetensors.index.json", json.dumps(index).encode())
    memory.pipe_file("/m/a.safetensors", save({"a": np.zeros(2)}))
    memory.pipe_file("/a.safetensors", save({"a": np.zeros(2)}))
    with pytest.raises(SourceError) as caught:
        open_checkpoint("memory://m")
    assert str(caught.value).startswith("memory://m/model.safetensors.index.json: ")
    assert reason in str(caught.value)


def test_only_what_is_asked_for_is_read(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 100_000
    arrays = {f"w{n}": np.full(size, n, np.float32) for n in range(5)}
    data = save(arrays)
    memory.pipe_file("/m/model.safetensors", data)
    ranges: list[tuple[int, int]] = []
    whole = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        assert start is not None
        assert end is not None
        ranges.append((start, end))
        return whole(self, path, start, end, **options)

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("read as a whole")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(MemoryFileSystem, "_open", opened)
    checkpoint = open_checkpoint("memory://m")
    header = len(data) - 5 * 4 * size
    assert [(0, 8), (8, header)] == ranges
    assert 3.0 == checkpoint.part("w3", 1000, 1010)[9]
    begin = header + 4 * (3 * size + 1000)
    assert [(begin, begin + 40)] == ranges[2:]
    assert size * 2.0 == checkpoint["w2"].sum(dtype=np.float64)
    begin = header + 4 * 2 * size
    assert [(begin, begin + 4 * size)] == ranges[3:]
    checkpoint.part("w3", 7, 7)
    assert 4 == len(ranges)


def test_adapters_are_read_from_remote_storage_too(memory: MemoryFileSystem) -> None:
    memory.pipe_file("/a.st", save(TENSORS))
    file = SafetensorsFile(resolve_path("memory://a.st"))
    assert all(np.array_equal(array, file.read(name)) for name, array in TENSORS.items())


@pytest.mark.parametrize("put", [put_local, put_memory, put_zip])
def test_threads(put: Callable[[Path], str], tmp_path: Path, memory: MemoryFileSystem) -> None:
    checkpoint = open_checkpoint(put(tmp_path))

    def read(number: int) -> bool:
        name, start = f"w{number % 4}", number % 30
        expected = TENSORS[name].reshape(-1)[start : start + 5]
        return np.array_equal(expected, checkpoint.part(name, start, start + 5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))


def read(file: Storage, start: int, size: int) -> bytes:
    out = bytearray(size)
    file.read_into(start, memoryview(out))
    return bytes(out)


def test_one_at_a_time_where_a_filesystem_has_one_connection(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/a", bytes(range(256)) * 4)
    position, whole = [0], MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        position[0] = start  # seek, be interrupted, read: what a connection does that is shared
        for _ in range(50):
            os.sched_yield() if hasattr(os, "sched_yield") else None
        return whole(self, path, position[0], position[0] + end - start, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    file = open_storage(resolve_path("memory://a"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: read(file, start, 2)[0], range(1000)))
    assert [start % 256 for start in range(1000)] == found


@pytest.fixture(params=["preadv", "seek"])
def local(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFile:
    """A file of 1000 bytes, read as each system can."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")
    (tmp_path / "file").write_bytes(bytes(n % 251 for n in range(1000)))
    return LocalFile(tmp_path / "file")


def test_local_ranges(local: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1000 == local.size
    for at_once in (1 << 30, 7):
        monkeypatch.setattr(system, "_AT_ONCE", at_once)
        for start, stop in [(0, 1000), (0, 1), (999, 1000), (10, 10), (1000, 1000), (250, 700)]:
            out = bytearray(stop - start)
            local.read_into(start, memoryview(out))
            assert bytes(n % 251 for n in range(start, stop)) == out


def test_local_threads(local: LocalFile, request: Any) -> None:
    def read(start: int) -> int:
        out = bytearray(2)
        local.read_into(start, memoryview(out))
        return out[1]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads do come between one another's seek and read
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    with ThreadPoolExecutor(8) as pool:
        assert [(n + 1) % 251 for n in range(998)] * 5 == list(pool.map(read, [*range(998)] * 5))


def test_a_local_file_that_has_become_shorter(local: LocalFile, tmp_path: Path) -> None:
    os.truncate(tmp_path / "file", 500)
    with pytest.raises(OSError, match="has become shorter") as caught:
        local.read_into(400, memoryview(bytearray(200)))
    assert str(tmp_path / "file") == caught.value.filename


def test_a_local_file_that_has_changed(local: LocalFile, tmp_path: Path) -> None:
    local.read_into(0, memoryview(bytearray(200)))
    with open(tmp_path / "file", "r+b") as other:
        other.write(bytes(300))
    os.utime(tmp_path / "file", ns=(1, 1))  # whatever the clock's ticks
    with pytest.raises(OSError, match="has changed since it was opened") as caught:
        local.read_into(0, memoryview(bytearray(200)))
    assert str(tmp_path / "file") == caught.value.filename


def test_a_local_file_that_is_replaced_is_read_to_its_end(local: LocalFile, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(bytes(1000))
    os.replace(tmp_path / "new", tmp_path / "file")
    out = bytearray(1000)
    local.read_into(0, memoryview(out))
    assert bytes(n % 251 for n in range(1000)) == out


@pytest.mark.parametrize("new", [bytes(50), bytes(100), bytes(200)])
def test_a_remote_file_that_has_changed(new: bytes, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/a", bytes(100))
    file = open_storage(resolve_path("memory://a"))
    assert isinstance(file, RemoteFile)
    assert 100 == file.size
    file.read_into(40, memoryview(bytearray(20)))
    memory.pipe_file("/a", new)
    with pytest.raises(SourceError, match=r"^memory://a: the file has changed since it was opened$"):
        file.read_into(40, memoryview(bytearray(20)))
    memory.rm_file("/a")
    with pytest.raises(SourceError, match=r"^memory://a: no such file or folder$"):
        file.read_into(0, memoryview(bytearray(10)))


def test_a_size_must_be_known(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/a.safetensors", save(TENSORS))
    info = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *a, **k: info(*a, **k) | {"size": None})
    with pytest.raises(SourceError, match=r"^memory://a.safetensors: its size is not known"):
        open_checkpoint("memory://a.safetensors")


@pytest.mark.parametrize("put", [put_local, put_memory, put_zip])
@pytest.mark.parametrize("tile", [None, 8, 24])
def test_elements_are_gathered(
    put: Callable[[Path], str],
    tile: int | None,
    tmp_path: Path,
    memory: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile:
        monkeypatch.setattr(LocalFile, "tile", tile)
        monkeypatch.setattr(RemoteFile, "tile", tile)
    checkpoint = open_checkpoint(put(tmp_path))
    for indices in ([], [0], [34], [5, 6], [0, 7, 8, 20, 34], list(range(35))):
        for name, array in TENSORS.items():
            found = checkpoint.at(name, np.array(indices, np.int64))
            assert np.array_equal(array.reshape(-1)[indices], found)
            assert found.dtype == array.dtype


@pytest.fixture
def lora(memory: MemoryFileSystem, tmp_path: Path) -> Checkpoint:
    """A LoRA at ``memory://lora``; its base."""
    base = models.save_base(models.net(), tmp_path / "base")
    models.save_lora(models.random_lora(models.net(), r=2, target_modules=["head"]), tmp_path / "lora")
    for path in (tmp_path / "lora").iterdir():
        memory.pipe_file(f"/lora/{path.name}", path.read_bytes())
    return open_checkpoint(base)


def test_a_remote_lora(lora: Checkpoint, tmp_path: Path) -> None:
    lora_to_shira(tmp_path / "lora", lora, tmp_path / "here.st")
    lora_to_shira("memory://lora", lora, tmp_path / "there.st")
    assert (tmp_path / "here.st").read_bytes() == (tmp_path / "there.st").read_bytes()


@pytest.mark.parametrize("method", ["info", "isdir", "isfile", "ls", "exists", "cat_file"])
def test_a_store_that_fails_as_a_lora_is_opened(
    method: str, lora: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its calls: one error that names the URL, or what is read is right."""
    real = getattr(MemoryFileSystem, method)
    for at in range(40):
        calls: list[None] = []

        def fail(*given: Any, _calls: list[None] = calls, _at: int = at, **options: Any) -> Any:
            _calls.append(None)
            if len(_calls) > _at:
                raise RuntimeError("Response payload is\nnot completed")  # noqa: EM101
            return real(*given, **options)

        with monkeypatch.context() as patched:
            patched.setattr(MemoryFileSystem, method, fail)
            try:
                assert 1 == len(lora_to_shira("memory://lora", lora, None).tensors)
            except SourceError as error:
                assert re.fullmatch(r"memory://lora\S*: Response payload is not completed", str(error))
        if len(calls) <= at:
            break


def test_what_a_server_says_is_passed_on(tmp_path: Path) -> None:
    """A failure is not taken for a file that is not there, which has a meaning for a configuration and in a place."""
    pytest.importorskip("aiohttp")
    answers = {"/broken": 500, "/busy": 503, "/gone": 404, "/secret": 403}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(next((code for path, code in answers.items() if self.path.startswith(path)), 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - its name

        def log_message(self, *_: Any) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{http.server_port}"
        try:
            for path, said in {
                "/broken": "500",
                "/busy": "503",
                "/gone": "no such file or folder",
                "/secret": "",
            }.items():
                with pytest.raises(SourceError, match=rf"^{url}{path}/w.safetensors: .*{said}") as caught:
                    open_checkpoint(f"{url}{path}/w.safetensors")
                assert ("no such file" in str(caught.value)) == (path in ("/gone", "/secret"))
                config, place = UPath(f"{url}{path}/config.json"), open_place(f"{url}{path}")
                if path in ("/broken", "/busy"):
                    for use in (partial(is_file, config), partial(place.read, "a.json")):
                        with pytest.raises(SourceError, match=f"^{url}{path}/.*json: {said}"):
                            use()
                else:
                    assert not is_file(config)
                    with pytest.raises(FileNotFoundError, match="no such file"):
                        place.read("a.json")
        finally:
            http.shutdown()
            thread.join()


def test_a_file_of_a_place_that_is_too_large(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/run/a.json", b"12345")
    place = open_place("memory://run")
    assert b"12345" == place.read("a.json")
    monkeypatch.setattr("shira_format.storage.places.MOST_INDEX", 4)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", None)
    with pytest.raises(SourceError, match=r"^memory://run/a.json: has 5 bytes; at most 4 are read$"):
        place.read("a.json")
