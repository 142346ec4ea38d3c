"""What is fuzzed: a registry of targets, one file each.

A target is a module of this package with two functions:

* ``make(random, folder)`` writes the files of one case into an empty folder; the same ``random.Random`` makes the same files;
* ``check(folder)`` does with them what a user would. To return, or to raise a ShiraError or an OSError, is right; every other
  exception, a crash, or more than the time and memory of :mod:`fuzz.oracle` is a violation.

A new target is a new module and one line in :data:`TARGETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from tempfile import gettempdir
from typing import Any

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: its name.
        about: what a case is, in a line.
        seconds: CPU seconds that a case may take.
        room: bytes of memory that a case may take beyond four times its files.
        environment: variables that are set before the module is imported, in long runs.
        quick: cases in the tests: a second or two.
        code: its module; that of its name by default.
    """

    name: str
    about: str
    seconds: float = 2.0
    room: int = 64 * MEGABYTE
    environment: Mapping[str, str] = field(default_factory=dict)
    quick: int = 100
    code: str = ""

    def module(self) -> Any:
        """The target's module, imported."""
        return import_module(f"{__name__}.{self.code or self.name}")

    def make(self, random: Random, folder: Path) -> None:
        """Write the files of a case into an empty folder."""
        self.module().make(random, folder)

    def check(self, folder: Path) -> None:
        """Do with a case's files what a user would; raises what is right or a violation, see above."""
        self.module().check(folder)


# Numba's functions check their bounds; its cache does not tell them from others, so they have one of their own.
_BOUNDS = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(Path(gettempdir()) / "shira-fuzz-numba")}
_EVERY = (
    Target("adapters", "an adapter file with changed bytes, manifest or streams, through both readers", quick=400),
    Target(
        "codecs",
        "a stream of a codec with changed bytes, through compiled and plain decoders",
        environment=_BOUNDS,
        quick=60,
    ),
    Target("kernels", "arguments of a compiled loop, against numpy", environment=_BOUNDS, quick=400),
    Target(
        "codecs_as_shipped",
        "the same streams, through the machine code that users run, between pages without access",
        code="codecs",
        quick=5,
    ),
    Target(
        "kernels_as_shipped",
        "the same arguments, for the machine code that users run, between pages without access",
        code="kernels",
        quick=50,
    ),
    Target("pickles", "a file of torch.save, from a generator of opcodes or with changed bytes", quick=300),
    Target("distributed", "a folder of torch.distributed.checkpoint with changed metadata", quick=150),
    Target("gguf_files", "a GGUF file with wrong counts, types and offsets", quick=600),
    Target(
        "loras",
        "a LoRA of some dialect whose names, shapes, options and patterns contradict each other",
        quick=150,
    ),
    Target(
        "folders", "a folder of CSR matrices, or a file of moments, with changed arrays and numbers", quick=200
    ),
    Target(
        "commands",
        "a command on files with hostile names and provenance, as text, JSON and HTML",
        seconds=4.0,
        room=256 * MEGABYTE,
        quick=60,
    ),
    Target(
        "switching",
        "a Switcher under resized, replaced, tied and overlapping weights, files cut short, arrays reused",
        seconds=60.0,
        room=256 * MEGABYTE,
        quick=2,
    ),
    Target(
        "kills",
        "a writer killed at each call that changes the disk, one after the other",
        seconds=60.0,
        room=256 * MEGABYTE,
        quick=1,
    ),
    Target(
        "threads",
        "threads that load, switch, revert, save and read the same objects",
        seconds=30.0,
        room=256 * MEGABYTE,
        quick=15,
    ),
)

TARGETS = {target.name: target for target in _EVERY}
