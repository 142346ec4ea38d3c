"""Weight files in an adapter's folder that were not read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shira_format.errors import SourceError

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Files that trainers save next to the weights.
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")


def refuse_unused(folder: Path, read: Iterable[Path]) -> None:
    """Refuse a folder with weight files other than ``read``, earlier states of mlx-lm's run, and a trainer's own.

    A copy of a file that was read, under its name with another ending, is not counted.

    Raises:
        SourceError: there are such files; the message names them.
    """
    if not folder.is_dir():
        return
    stems = {path.stem for path in read}
    unused = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _ENDINGS and path.stem not in stems
        and not path.name.startswith(_TRAINING) and not path.stem.endswith(tuple(f"_{stem}" for stem in stems))
    )  # fmt: skip
    if unused:
        raise SourceError(
            f"{folder}: weight files that were not used: {', '.join(unused)}; name the file to convert, or allow unused "
            "files (--allow-unused)"
        )
