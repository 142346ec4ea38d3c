"""``adapter_config.json`` of PEFT's SHiRA, and which folders hold such an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shira_format.convert.peft_shira.files import SHIRA
from shira_format.errors import SourceError
from shira_format.lora.files import read_json
from shira_format.lora.peft.config import CONFIG, WEIGHTS

# Not "random", for which PEFT would draw a mask for each layer as it loads, and discard it. With an unknown name it takes
# the indices of the file, and warns only if inference_mode is not set.
MASK_TYPE = "given"


def peft_config(
    rank: int, modules: Iterable[str], modules_to_save: Sequence[str], base_model: Mapping[str, Any]
) -> dict[str, Any]:
    """``adapter_config.json``, with the keys that every PEFT with SHiRA knows.

    ``target_modules`` is a regex: PEFT also matches a name in a list with the end of a module's name, so that ``head`` would
    adapt ``other.head`` too.
    """
    known = {key: base_model.get(key) for key in ("id", "revision")}
    known = {key: value if isinstance(value, str) and value else None for key, value in known.items()}
    return {
        "auto_mapping": None,
        "base_model_name_or_path": known["id"],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": MASK_TYPE,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": SHIRA.peft_type,
        "r": rank,
        "random_seed": None,
        "revision": known["revision"],
        "target_modules": "|".join(map(re.escape, modules)),
        # With SEQ_CLS and TOKEN_CLS, PEFT would require a saved classifier.
        "task_type": None,
    }


def own_files(folder: Path) -> set[str]:
    """Names of the files of a SHiRA adapter of PEFT.

    Raises:
        SourceError: the folder holds none.
    """
    if read_json(folder / CONFIG).get("peft_type") != SHIRA.peft_type:
        raise SourceError(f"its peft_type is not {SHIRA.peft_type}")
    return {CONFIG, WEIGHTS[0]}
