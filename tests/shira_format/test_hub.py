"""``hf://`` locations, against a hub of our own on this machine, and then against the cache that it left."""

from __future__ import annotations

import builtins
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.storage import paths as storage
from shira_format.storage.hub import download, hub_identity, needed_files

COMMIT = "a" * 40
OTHER = "b" * 40
WEIGHTS = save({"w": np.arange(6, dtype=np.float32)})
OLD = save({"w": np.zeros(6, np.float32)})


def index(**files: str) -> bytes:
    return json.dumps({"weight_map": files}).encode()


PIPELINE = {
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
    ).encode(),
    "all-in-one.safetensors": b"must not be fetched",
    "unet/config.json": b"{ }",
    "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
    "unet/diffusion_pytorch_model.fp16.safetensors": b"must not be fetched",
    "unet/diffusion_pytorch_model.bin": b"must not be fetched",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.fp16.json": index(a="model.fp16-00001-of-00001.safetensors"),
    "text_encoder/model.fp16-00001-of-00001.safetensors": save({"a": np.zeros(3, np.float16)}),
    "text_encoder/flax_model.msgpack": b"must not be fetched",
    "scheduler/scheduler_config.json": b"{  }",
    "elsewhere/model.safetensors": b"must not be fetched",
}
SINGLE = {
    "config.json": b"{}",
    "tokenizer.model": b"t",
    "vocab.txt": b"v",
    "README.md": b"must not be fetched",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": b"must not be fetched",
    "pytorch_model.bin": b"must not be fetched",
    "pytorch_model.bin.index.json": b"must not be fetched",
    "onnx/model.onnx": b"must not be fetched",
    "sub/deep/model.safetensors": OLD,
    "sub/deep/config.json": b"{}",
}
SHARDS = {
    "model.safetensors.index.json": index(a="m-1.safetensors", b="m-2.safetensors"),
    "m-1.safetensors": save({"a": np.zeros(2)}),
    "m-2.safetensors": save({"b": np.ones(2)}),
    "m-3.safetensors": b"must not be fetched",
    "config.json": b"{}",
}
REPOSITORIES = {
    "me/single": {"main": SINGLE, "refs/pr/3": {"model.safetensors": OLD}, "v1": {"model.safetensors": OLD}},
    "me/shards": {"main": SHARDS},
    "me/pipeline": {"main": PIPELINE},
    "me/odd[1]": {},
    "me/names": {"main": {"we[i]ghts*.safetensors": WEIGHTS}},
}


class Hub(BaseHTTPRequestHandler):
    """The few requests that the client makes; ``fetched`` holds the paths of files that were sent."""

    protocol_version = "HTTP/1.1"
    fetched: list[str]
    requests: list[str]
    failing: int

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        if self.failing:
            return self.send(self.failing, {}, b"{}", body=body)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            repo, kind, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        else:
            repo, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo == "me/gated":
            return self.refuse(403, "GatedRepo", body=body)
        if repo not in REPOSITORIES:
            return self.refuse(401, "RepoNotFound", body=body)
        commits = {self.commit(name): files for name, files in REPOSITORIES[repo].items()}
        commit = revision if revision in commits else self.commit(revision)
        files = commits.get(commit)
        if files is None:
            return self.refuse(404, "RevisionNotFound", body=body)
        if kind == "revision":
            listed = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.send(200, {}, json.dumps(listed).encode(), body=body)
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.send(200, {}, json.dumps(tree).encode(), body=body)
        name = "/".join(parts[4:])
        if body:
            self.fetched.append(name)
        tag = hashlib.sha256(files[name]).hexdigest()
        return self.send(200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, files[name], body=body)

    @staticmethod
    def commit(revision: str) -> str:
        return COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()

    def refuse(self, status: int, code: str, *, body: bool) -> None:
        self.send(status, {"X-Error-Code": code}, b"{}", body=body)

    def send(self, status: int, headers: dict[str, str], data: bytes, *, body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub, and a client that knows no other, with an empty cache."""

    class Here(Hub):
        fetched: list[str] = []
        requests: list[str] = []
        failing = 0

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield Here
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def refused(text: str) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{text}: ")
    return str(caught.value).removeprefix(f"{text}: ")


def test_a_repository_of_one_file(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("hf://me/single")
    assert np.arange(6).tolist() == checkpoint["w"].tolist()
    assert {"config.json", "tokenizer.model", "vocab.txt", "model.safetensors"} == set(hub.fetched)
    assert checkpoint.folder is not None
    assert {"config.json", "tokenizer.model", "vocab.txt", "model.safetensors"} == {
        path.name for path in checkpoint.folder.iterdir()
    }
    assert {"id": "me/single", "revision": COMMIT} == storage.hub_identity("hf://me/single")

    hub.fetched.clear()
    assert ["w"] == list(open_checkpoint("hf://me/single@main/"))
    assert [] == hub.fetched  # it is in the cache

    offline(monkeypatch)
    hub.requests.clear()
    again = open_checkpoint("hf://me/single")
    assert checkpoint.files == again.files
    assert {"id": "me/single", "revision": COMMIT} == hub_identity("hf://me/single")
    assert [] == hub.requests


def test_shards(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("hf://me/shards", "hf://me/shards/model.safetensors.index.json"):
        assert ["a", "b"] == list(open_checkpoint(text))
    assert {*SHARDS} - {"m-3.safetensors"} == set(hub.fetched)
    offline(monkeypatch)
    assert ["a", "b"] == list(open_checkpoint("hf://me/shards"))
    assert "no such path" in refused("hf://me/shards/m-3.safetensors")


def test_an_index_alone_brings_its_shards_and_no_more(hub: type[Hub]) -> None:
    open_checkpoint("hf://me/shards/model.safetensors.index.json")
    assert ["m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json"] == sorted(hub.fetched)


@pytest.mark.parametrize("text", ["hf://me/pipeline", "hf://me/pipeline/model_index.json"])
def test_a_pipeline(text: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(text)
    assert ("text_encoder", "unet") == checkpoint.components
    assert ["text_encoder/a", "unet/w"] == list(checkpoint)
    assert {name for name, data in PIPELINE.items() if data != b"must not be fetched"} == set(hub.fetched)
    offline(monkeypatch)
    assert ["text_encoder/a", "unet/w"] == list(open_checkpoint(text))


def test_a_folder_and_a_file_of_a_repository(hub: type[Hub]) -> None:
    assert 0.0 == open_checkpoint("hf://me/single/sub/deep")["w"].sum()
    assert ["sub/deep/config.json", "sub/deep/model.safetensors"] == sorted(hub.fetched)
    hub.fetched.clear()
    assert 15.0 == open_checkpoint("hf://me/single/model.safetensors")["w"].sum()
    assert ["model.safetensors"] == hub.fetched
    assert ["w"] == list(open_checkpoint("hf://me/pipeline/unet"))


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("hf://me/single@v1", "v1"),
        ("hf://me/single@refs/pr/3", "refs/pr/3"),
        ("hf://me/single@refs%2Fpr%2F3", "refs/pr/3"),
        ("hf://me/single@refs/pr/3/model.safetensors", "refs/pr/3"),
        (f"hf://me/single@{Hub.commit('v1')}/model.safetensors", "v1"),
    ],
)
def test_revisions(text: str, revision: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.0 == open_checkpoint(text)["w"].sum()
    assert {"id": "me/single", "revision": Hub.commit(revision)} == hub_identity(text)
    offline(monkeypatch)
    assert 0.0 == open_checkpoint(text)["w"].sum()
    assert "not in the cache" in refused("hf://me/single")


def test_names_are_no_patterns(hub: type[Hub]) -> None:
    assert ["w"] == list(open_checkpoint("hf://me/names"))
    assert ["we[i]ghts*.safetensors"] == hub.fetched


def test_what_the_hub_does_not_have(hub: type[Hub]) -> None:
    assert "no such repository" in refused("hf://me/nothing")
    assert "gated" in refused("hf://me/gated")
    assert "the repository has no revision 'v9'" == refused("hf://me/single@v9")
    assert "no such path in the repository" == refused("hf://me/single/nothing")
    assert "no such path in the repository" == refused("hf://me/single/config.json/x")
    assert "no weights of a supported format there (.safetensors, .bin, .gguf)" == refused("hf://me/single/onnx")
    assert {"id": "me/nothing"} == hub_identity("hf://me/nothing")
    hub.failing = 403
    assert "the hub refuses the request: " in refused("hf://me/single")
    assert [] == hub.fetched


def test_a_hub_that_fails_is_as_good_as_none(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("hf://me/single/model.safetensors")
    hub.failing = 501
    assert ["w"] == list(open_checkpoint("hf://me/single/model.safetensors"))
    assert refused("hf://me/shards").startswith("not in the cache, and the hub cannot be reached: ")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert ["w"] == list(open_checkpoint("hf://me/single/model.safetensors"))
    assert refused("hf://me/shards").startswith("not in the cache, and the hub cannot be reached: ")


def test_offline_with_half_of_it_in_the_cache(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("hf://me/shards/m-1.safetensors")
    open_checkpoint("hf://me/pipeline/unet")
    offline(monkeypatch)
    assert ["a"] == list(open_checkpoint("hf://me/shards/m-1.safetensors"))
    assert refused("hf://me/shards/model.safetensors.index.json").startswith(
        "no such path in the repository (in the cache;"
    )
    assert refused("hf://me/pipeline/text_encoder").startswith("no such path in the repository (in the cache;")


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://me", "hf://me/", "hf:///name", "hf://me/name@", "hf://me/name@/x", "hf://me/name@refs/../x@",
        "hf://me/name/../other", "hf://me/name//x", "hf://me/name/./x", "hf://me/name/a\\b", "hf://me/name@..",
        "hf://me/name@%2E%2E/x", "hf://me/a b", "hf://mé/name", "hf://me/name@a@b",
    ],
)  # fmt: skip
def test_what_is_no_location(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        download(text)
    assert f"{text}: not of the form hf://OWNER/NAME[@REVISION][/PATH]" == str(caught.value)
    with pytest.raises(SourceError):
        hub_identity(text)


def test_what_is_no_model(hub: type[Hub]) -> None:
    assert "only repositories of models" in refused("hf://datasets/me/name")
    assert "Cannot have -- or .." in refused("hf://me/a--b")
    assert [] == hub.requests


@pytest.mark.parametrize("text", ["", "model.safetensors", "s3://bucket/me/name", "/hf://me/name"])
def test_other_paths_have_no_identity(text: str) -> None:
    assert {} == hub_identity(text) == storage.hub_identity(text) == storage.hub_identity(Path(text))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs huggingface_hub: pip install 'shira-format[hub]'" == refused("hf://me/name")


def never(name: str) -> Any:
    raise AssertionError(f"{name} was read")


@pytest.mark.parametrize(
    ("names", "inside", "expected"),
    [
        (["pytorch_model.bin", "training_args.bin", "config.json"], "", ["config.json", "pytorch_model.bin"]),
        (["adapter_model.bin", "training_args.bin"], "", ["adapter_model.bin"]),
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            "",
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (
            ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "optimizer.pt"],
            "",
            ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"],
        ),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"],
            "",
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ),
        (["diffusion_pytorch_model.bin", "model.gguf"], "", ["diffusion_pytorch_model.bin"]),
        (["m.gguf", "README.md"], "", ["m.gguf"]),
        (
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
            "",
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        ),
        (
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n.gguf"],
            "m-00001-of-00002.gguf",
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        ),
        ([".metadata", "__0_0.distcp", "x.bin"], "", [".metadata", "__0_0.distcp"]),
        (["s/a.bin", "s/pytorch_model.bin", "t/pytorch_model.bin"], "s", ["s/pytorch_model.bin"]),
        (["../model.safetensors", "..\\model.json", "model.safetensors"], "", ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "model.non_ema.safetensors"], "", ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], "", ["pytorch_model.bin"]),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin"], "", ["model.fp16.safetensors"]),
    ],
)
def test_what_is_wanted(names: list[str], inside: str, expected: list[str]) -> None:
    assert expected == needed_files(names, inside, never, "text")


def test_several_checkpoints_are_not_fetched() -> None:
    for ending in ("safetensors", "gguf"):
        with pytest.raises(SourceError) as caught:
            needed_files([f"b.{ending}", f"a.{ending}"], "", never, "text")
        assert f"text: several checkpoints (a.{ending}, b.{ending}, ...); name one" == str(caught.value)


@pytest.mark.parametrize(
    "content", [[], 3, {"weight_map": []}, {"weight_map": {"a": 3, "b": "../m", "c": "m"}}, {}]
)
def test_an_index_that_is_none_is_for_the_one_who_opens_it(content: Any) -> None:
    names = ["model.safetensors.index.json", "m", "x"]
    found = needed_files(names, "", lambda name: content, "text")
    assert {"model.safetensors.index.json"} <= set(found) <= {"model.safetensors.index.json", "m"}
    assert [] == [
        name
        for name in needed_files(["model_index.json", "unet/model.safetensors"], "", lambda _: [], "")
        if "/" in name
    ]
