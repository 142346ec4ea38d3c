"""Tensors that the options of an adapter say are in its file: without them, a part of what was trained is lost."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from shira_format.errors import SourceError
from shira_format.lora.peft.base_names import BaseNames, Keys
from shira_format.lora.peft.config import Config

_LOST = "what was trained of it is lost; save the adapter again, or, if it was left out on purpose, remove it from the options"


def check_saved(saved: Iterable[str], found: Collection[str], base: Collection[str], where: object) -> None:
    """Refuse a file without tensors of a module that PEFT saves whole.

    Modules that the base lacks are no promise: PEFT lists "classifier" and "score" for any classifier.

    Args:
        saved: ``modules_to_save``.
        found: names of the whole tensors in the file.
        base: the base's names.
        where: the file, for messages.

    Raises:
        SourceError: the base has a module of ``saved``, and the file has nothing of it.
    """
    for module in saved:
        inside = re.compile(rf"(?:.*\.)?{re.escape(module)}\..+")
        if any(map(inside.fullmatch, base)) and not any(map(inside.fullmatch, found)):
            raise SourceError(f"{where}: modules_to_save has {module!r}, and no tensor of it is here: {_LOST}")


def check_biases(config: Config, keys: Keys, names: BaseNames, where: object) -> None:
    """Refuse a file without any bias, if the option ``bias`` trained some.

    Raises:
        SourceError: the base has such biases, and the file none.
    """
    if config["bias"] in (None, "none") or any(name.endswith("bias") for name in keys.plain):
        return
    trained = [names.tensor(f"{layer.module}.bias") for layer in keys.layers]
    if config["bias"] == "all":
        trained = [name for name in names.base if name.endswith(".bias")]
    if lost := next((name for name in trained if name in names.base), None):
        raise SourceError(f"{where}: bias is {config['bias']!r}, and no bias is here, such as {lost!r}: {_LOST}")
