"""Tensors that the options of an adapter say are in its file: without them, a part of what was trained is lost."""

from __future__ import annotations

import re

from shira_format.errors import SourceError
from shira_format.lora.peft.base_names import BaseNames, Keys
from shira_format.lora.peft.config import Config

_LOST = "what was trained of it is lost; save the adapter again, or, if it was left out on purpose, remove it from the options"


def check_promised(config: Config, keys: Keys, names: BaseNames, where: object) -> None:
    """Refuse a file that lacks whole tensors that PEFT saves under these options.

    Modules of ``modules_to_save`` that the base lacks are no promise: PEFT lists "classifier" and "score" for any classifier.

    Raises:
        SourceError: the base has a module of ``modules_to_save``, or biases that ``bias`` trains, and the file has none of them.
    """
    for module in config.saved:
        inside = re.compile(rf"(?:.*\.)?{re.escape(module)}\..+")
        if any(map(inside.fullmatch, names.base)) and not any(map(inside.fullmatch, keys.plain)):
            raise SourceError(f"{where}: modules_to_save has {module!r}, and no tensor of it is here: {_LOST}")
    if config["bias"] in (None, "none") or any(name.endswith("bias") for name in keys.plain):
        return
    trained = [names.tensor(f"{layer.module}.bias") for layer in keys.layers]
    if config["bias"] == "all":
        trained = [name for name in names.base if name.endswith(".bias")]
    if lost := next((name for name in trained if name in names.base), None):
        raise SourceError(f"{where}: bias is {config['bias']!r}, and no bias is here, such as {lost!r}: {_LOST}")
