"""Many adapters of one base: the most recently used stay decoded in memory, within a budget; the others are on disk."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.loaded import LoadedAdapter, load_adapter
from shira_format.entries.placed import load_placed
from shira_format.names.placement import Layout

_ENDINGS = (".st", ".safetensors")


@dataclass(frozen=True)
class PoolStatistics:
    """Counters since the pool was made.

    Attributes:
        hits: how often a requested adapter was in memory.
        misses: how often it had to be read while the caller waited.
        prefetched: adapters read ahead.
        evicted: adapters dropped to stay within the budget.
        held: adapters in memory now.
        held_bytes: their bytes.
        read_bytes: bytes of all files that were read.
        read_seconds: time spent reading, decoding and checking them.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    evicted: int = 0
    held: int = 0
    held_bytes: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0


@dataclass(frozen=True)
class _Held:
    adapter: LoadedAdapter
    version: tuple[int, int, int]  # of the file: inode, size, time


class AdapterPool(Mapping[str, Path]):
    """The adapter files of a folder, by their names without suffix.

    A file is read when it is first requested and kept decoded within the budget; the least recently used are dropped first.
    No file stays open or mapped. A file that was replaced is read again at the next request. Thread-safe: if several
    threads request one file, one reads it.

    Args:
        folder: whose ``.st`` and ``.safetensors`` files are adapters; or a mapping from names to paths.
        budget: bytes of decoded adapters that are kept. A larger adapter is read, used and not kept.
        layout: where a server's rank has the adapters' tensors: only what the rank has is decoded and kept.
        base: the checkpoint that the adapters are for: needed for files that are read with their base alone, and by a layout as by
            :class:`shira_format.live.Switcher`.

    Example:
        >>> pool = AdapterPool("adapters/", budget=2 << 30)
        >>> switcher = Switcher(model, pool=pool)
        >>> switcher.switch("style")
        >>> pool.prefetch("next")
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        *,
        budget: int = 1 << 30,
        layout: Layout | None = None,
        base: str | os.PathLike[str] | Checkpoint | None = None,
    ) -> None:
        """Raises: NotADirectoryError, FileNotFoundError; ValueError if two files have one name; SourceError: ``base`` is no checkpoint."""
        if budget < 0:
            raise ValueError(f"budget {budget} is negative")
        self._folder = None if isinstance(folder, Mapping) else Path(folder)
        self._paths = {name: Path(path) for name, path in folder.items()} if isinstance(folder, Mapping) else {}
        self._budget = budget
        self._layout = layout
        self._base = None if base is None else open_checkpoint(base)
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._reading: dict[str, Future[_Held]] = {}
        self._ahead: ThreadPoolExecutor | None = None
        self._counts = PoolStatistics()
        if self._folder is not None:
            self.refresh()

    def __getitem__(self, name: str) -> Path:
        try:
            return self._paths[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r} in the pool of {len(self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def refresh(self) -> None:
        """List the folder again, for files that were added or removed."""
        if self._folder is None:
            return
        found: dict[str, Path] = {}
        for path in sorted(self._folder.iterdir()):
            if path.suffix in _ENDINGS and path.is_file():
                if path.stem in found:
                    raise ValueError(f"{path} and {found[path.stem]} are both named {path.stem!r}")
                found[path.stem] = path
        with self._lock:
            self._paths = found
            for name in self._held.keys() - found.keys():
                del self._held[name]

    def get_adapter(self, name: str, executor: Executor | None = None) -> LoadedAdapter:
        """The decoded adapter ``name``.

        Args:
            name: of the adapter.
            executor: threads that decode.

        Raises:
            KeyError: the pool has none of this name.
            FormatError, BaseMismatch, OSError: see :func:`shira_format.entries.loaded.load_adapter`.
        """
        return self._get(name, executor, ahead=False)

    def prefetch(self, name: str) -> Future[None]:
        """Read an adapter in the background, for the next :meth:`get_adapter`; the future raises its errors."""
        if name not in self._paths:
            raise KeyError(f"no adapter {name!r} in the pool of {len(self)}")
        with self._lock:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, thread_name_prefix="shira-prefetch")
            ahead = self._ahead

        def read() -> None:
            self._get(name, None, ahead=True)

        return ahead.submit(read)

    @property
    def statistics(self) -> PoolStatistics:
        """The counters now."""
        with self._lock:
            size = sum(held.adapter.nbytes for held in self._held.values())
            return replace(self._counts, held=len(self._held), held_bytes=size)

    def clear(self) -> None:
        """Drop all decoded adapters; those applied to a model stay applied."""
        with self._lock:
            self._held.clear()

    def _get(self, name: str, executor: Executor | None, *, ahead: bool) -> LoadedAdapter:
        path = self[name]
        version = _version(path)
        with self._lock:
            held = self._held.get(name)
            if held is not None and held.version == version:
                self._held.move_to_end(name)
                if not ahead:
                    self._count(hits=1)
                return held.adapter
            future = self._reading.get(name)
            mine = future is None
            if future is None:
                future = self._reading[name] = Future()
            self._count(**({"prefetched": int(mine)} if ahead else {"misses": 1}))
        if mine:
            self._read(name, path, version, executor, future)
        try:
            return future.result().adapter
        finally:
            del future  # an error holds this frame: a circle would keep all that the caller holds, such as threads

    def _read(
        self,
        name: str,
        path: Path,
        version: tuple[int, int, int],
        executor: Executor | None,
        future: Future[_Held],
    ) -> None:
        start = time.perf_counter()
        try:
            held = _Held(self._decoded(path, executor), version)
        except BaseException as error:  # others may wait for it
            with self._lock:
                del self._reading[name]
            future.set_exception(error)
            del future  # as above
            return
        with self._lock:
            del self._reading[name]
            self._count(read_bytes=version[1], read_seconds=time.perf_counter() - start)
            self._held.pop(name, None)
            if held.adapter.nbytes <= self._budget:
                self._held[name] = held
            size = sum(held.adapter.nbytes for held in self._held.values())
            while size > self._budget:
                size -= self._held.popitem(last=False)[1].adapter.nbytes
                self._count(evicted=1)
        future.set_result(held)

    def _decoded(self, path: Path, executor: Executor | None) -> LoadedAdapter:
        if self._layout is None:
            return load_adapter(path, executor, base=self._base)
        return load_placed(path, self._layout, executor, base=self._base)

    def _count(self, **more: float) -> None:
        self._counts = replace(self._counts, **{key: getattr(self._counts, key) + n for key, n in more.items()})


def _version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
