"""``hf://owner/name[@revision][/path]``: the files of a checkpoint on the Hugging Face hub, by its client and its cache.

Only the files that the checkpoint needs are downloaded. Without a connection the cache is used.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.storage.paths import MOST_INDEX, one_line, read_file
from shira_format.storage.weight_files import SHARD, TRAINING, find_weights, is_index

_SYNTAX = "hf://OWNER/NAME[@REVISION][/PATH]"
_LOCATION = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<inside>.*))?",
    re.ASCII,
)
# Files of a model other than weights: configs, vocabularies, templates.
_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_OF_ADAPTERS = (".safetensors", ".bin", ".pt", ".pth")
_COMMIT = re.compile("[0-9a-f]{40}")

# Reads a file of the repository, downloaded if necessary.
Peek = Callable[[str], Any]


@dataclass(frozen=True)
class _Location:
    text: str
    repo: str
    revision: str
    inside: str

    def __str__(self) -> str:
        return self.text


def download(text: str) -> Path:
    """Download the files that the checkpoint at ``text`` needs; returns its path in the hub's cache.

    For a folder these are its weights (safetensors if there are any, else PyTorch's, else GGUF or a distributed
    checkpoint) and its small files; for a diffusers pipeline the same of every component; for a file that file and the
    shards that it lists. Shards without an index are read together. Without a connection: the files in the cache.

    Raises:
        SourceError: a malformed location; no such repository, revision or path; no access; neither online nor in the cache;
            a link in the cache leads out of it.
    """
    where = _parsed(text)
    with optional_import(f"{text}: needs huggingface_hub", "hub"):
        from huggingface_hub import HfApi
    try:
        with _refusals(where):
            names = [
                file.rfilename for file in HfApi().model_info(where.repo, revision=where.revision).siblings or ()
            ]
    except SourceError:
        raise
    except Exception as error:  # no connection: the exceptions differ between versions of the client
        return _cached(where, one_line(error))

    def fetch(names: list[str]) -> Path:
        try:
            with _refusals(where):
                return _snapshot(where, allow_patterns=[glob.escape(name) for name in names])
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"{where}: the download failed: {one_line(error)}") from None

    def peek(name: str) -> Any:
        return _read_json(fetch([name]) / name, where)

    root = fetch(needed_files(names, where.inside, peek, text))
    _check_links(root, where)
    return root / where.inside


def hub_identity(text: str) -> dict[str, str]:
    """The ``id`` of the repository and its ``revision``, a commit, in the cache; empty for paths that are not on the hub.

    Call it after :func:`download`, which updates the cache.
    """
    if not text.startswith("hf://"):
        return {}
    where = _parsed(text)
    try:
        commit = _snapshot(where, allow_patterns=[], local_files_only=True).name
    except Exception:  # not in the cache, or no client
        return {"id": where.repo}
    return {"id": where.repo} | ({"revision": commit} if _COMMIT.fullmatch(commit) else {})


def needed_files(names: Iterable[str], inside: str, peek: Peek, text: str) -> list[str]:
    """The files of a repository that the checkpoint at ``inside`` needs, sorted by name.

    Args:
        names: all files, as paths in the repository.
        inside: a file or a folder in the repository; empty for its root.
        peek: reads a JSON file of the repository.
        text: the location as the user wrote it, for messages.

    Raises:
        SourceError: there is nothing at ``inside``, or it has no weights or several checkpoints.
    """
    names = sorted(name for name in names if _is_plain(name))
    if inside in names:
        folder, _, name = inside.rpartition("/")
        here = _within(names, folder)
        if name == "model_index.json":
            found = _pipeline(here, folder, peek, text)
        else:
            found = [name, *_shards(name, here, folder, peek)]
        return sorted(_join(folder, name) for name in found)
    here = _within(names, inside)
    if not here:
        raise SourceError(
            f"{text}: no such path in the repository" if inside else f"{text}: the repository is empty"
        )
    if "model_index.json" in here:
        found = _pipeline(here, inside, peek, text)
    else:
        weights = _weights(here, inside, peek, text)
        if not weights:
            raise SourceError(f"{text}: no weights of a supported format there (.safetensors, .bin, .gguf)")
        found = [*weights, *_small(here)]
    return sorted(_join(inside, name) for name in found)


def _pipeline(here: list[str], folder: str, peek: Peek, text: str) -> list[str]:
    """The files of a diffusers pipeline; whether they are complete is checked when it is opened."""
    listed = peek(_join(folder, "model_index.json"))
    found = _small(here)
    for component in listed if isinstance(listed, dict) else ():
        files = _within(here, component) if _is_plain(component) else []
        within = _join(folder, component)
        found += [f"{component}/{name}" for name in [*_weights(files, within, peek, text), *_small(files)]]
    return found


def _weights(here: list[str], folder: str, peek: Peek, text: str) -> list[str]:
    """The files of weights directly in a folder whose files are ``here``."""
    here = [name for name in here if "/" not in name]
    if (usual := find_weights(here)) is not None:
        return [usual.name, *_shards(usual.name, here, folder, peek)]
    if ".metadata" in here:  # torch.distributed.checkpoint
        return [name for name in here if name == ".metadata" or name.endswith(".distcp")]
    if "adapter_config.json" in here:  # all, so that what is not used is found
        return [name for name in here if name.endswith(_OF_ADAPTERS) and not name.startswith(TRAINING)]
    for ending in (".safetensors.index.json", ".safetensors", "adapter_model.bin", ".bin", ".gguf"):
        found = [name for name in here if name.endswith(ending) and (ending != ".bin" or SHARD.search(name))]
        heads = {SHARD.sub("", name) for name in found}
        if len(heads) > 1:
            first, second = sorted(heads)[:2]
            raise SourceError(f"{text}: several checkpoints ({first}, {second}, ...); name one")
        if found:
            return sorted({*found, *(shard for name in found for shard in _shards(name, here, folder, peek))})
    return []


def _shards(name: str, here: list[str], folder: str, peek: Peek) -> list[str]:
    """The other files that ``name`` needs, if the folder has them: missing ones are reported when it is opened."""
    if split := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})((?:\.[\w-]+)?\.(?:gguf|safetensors|bin))", name):
        stem, count, ending = split.groups()
        parts = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-{count}{re.escape(ending)}")
        return [other for other in here if parts.fullmatch(other) and other != name]
    if not is_index(name):
        return []
    index = peek(_join(folder, name))
    files = index.get("weight_map") if isinstance(index, dict) else None
    named = {file for file in files.values() if isinstance(file, str)} if isinstance(files, dict) else set()
    return [other for other in here if other in named]


def _small(here: list[str]) -> list[str]:
    """The small files directly in a folder, without indexes of shards: those belong to the weights."""
    return [name for name in here if "/" not in name and name.endswith(_SMALL) and not is_index(name)]


def _within(names: list[str], folder: str) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_plain(name: str) -> bool:
    """Whether a path in the repository stays in it, on every system."""
    return "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _parsed(text: str) -> _Location:
    match = _LOCATION.fullmatch(text)
    if match is None:
        raise SourceError(f"{text}: not of the form {_SYNTAX}")
    inside = (match["inside"] or "").rstrip("/")
    revision = unquote(match["revision"] or "main")
    if not _is_plain(revision) or (inside and not _is_plain(inside)):
        raise SourceError(f"{text}: not of the form {_SYNTAX}")
    repo = match["repo"]
    if repo.split("/")[0] in ("datasets", "spaces", "buckets"):
        raise SourceError(f"{text}: only repositories of models can be read: {_SYNTAX}")
    return _Location(text, repo, revision, inside)


def _snapshot(where: _Location, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(where.repo, revision=where.revision, **options))


def _cached(where: _Location, why: str) -> Path:
    """The same from the cache alone; ``why``: the reason that the hub cannot be reached."""
    try:
        root = _snapshot(where, allow_patterns=[], local_files_only=True)
    except Exception:
        raise SourceError(f"{where}: not in the cache, and the hub cannot be reached: {why}") from None
    _check_links(root, where)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    try:
        needed_files(names, where.inside, lambda name: _read_json(root / name, where), where.text)
    except SourceError as error:
        raise SourceError(f"{error} (in the cache; the hub cannot be reached: {why})") from None
    return root / where.inside


def _check_links(root: Path, where: _Location) -> None:
    """Refuse a snapshot with links to other files than those that the client downloaded for it, as in a cache from elsewhere."""
    repository = root.parent.parent
    own = repository.resolve(), (repository / "blobs").resolve()  # which may be a link to another disk
    for path in root.rglob("*"):
        if path.is_symlink() and not any((target := path.resolve()).is_relative_to(folder) for folder in own):
            raise SourceError(f"{where}: in the cache, {path} leads to {target}, which is not of this repository")


def _read_json(path: Path, where: _Location) -> Any:
    try:
        return json.loads(read_file(path, MOST_INDEX).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{where}: {path.name}: {one_line(error)}") from None


@contextmanager
def _refusals(where: _Location) -> Iterator[None]:
    """Turn refusals of the hub into a SourceError; other exceptions, such as a lost connection, pass."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(f"{where}: gated: accept its terms on the hub and log in (hf auth login)") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{where}: no such repository, or a private one that needs a login (hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{where}: the repository has no revision {where.revision!r}") from None
    except errors.HFValidationError as error:
        raise SourceError(f"{where}: {one_line(error)}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 500)
        if status in (408, 429) or status >= 500:
            raise  # a problem of the hub, not of the request
        raise SourceError(f"{where}: the hub refuses the request: {one_line(error)}") from None
