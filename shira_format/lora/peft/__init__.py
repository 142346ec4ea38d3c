"""PEFT's adapters: the files that ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path

from shira_format.errors import SourceError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."


def find_peft_files(path: Path) -> tuple[Path, Path] | None:
    """The weights and the configuration of the adapter at ``path``: a file of weights, or a folder.

    In a folder without weights, the adapter may be in a subfolder: PEFT saves adapters of other names than "default" there.

    Raises:
        SourceError: several subfolders have adapters.
    """
    if path.is_file():
        config = path.with_name(CONFIG)
        return (path, config) if config.is_file() else None
    config = path / CONFIG
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is not None and config.is_file():
        return found, config
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and (folder / CONFIG).is_file()]
    if len(inner) > 1:
        raise SourceError(f"{path}: several adapters ({', '.join(folder.name for folder in inner)}); name one")
    return find_peft_files(inner[0]) if inner else None
