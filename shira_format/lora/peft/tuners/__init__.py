"""PEFT's adapters that are no LoRA, by ``peft_type``; a file per tuner.

Each module has a :class:`~shira_format.lora.peft.tuners.common.Tuner` named ``TUNER``: the parts of its keys, its options, and a
function from the parts of one layer to the change of its weight. What no change of the base's weights can do, or cannot be computed
exactly from the files, is refused by its name.
"""

from __future__ import annotations

from importlib import import_module

from shira_format.lora.peft.tuners.common import Tuner

# By peft_type, the module.
TUNERS = {
    "OFT": "oft",
    "BOFT": "boft",
    "HRA": "hra",
    "ROAD": "road",
    "IA3": "ia3",
    "BEFT": "beft",
    "LN_TUNING": "norms",
    "TRAINABLE_TOKENS": "token_rows",
    "ADALORA": "adalora",
    "LOHA": "loha",
    "LOKR": "lokr",
    "HIRA": "hira",
    "DELORA": "delora",
    "GLORA": "glora",
    "GRALORA": "gralora",
    "VERA": "vera",
    "RANDLORA": "randlora",
    "VBLORA": "vblora",
    "MISS": "miss",
    "C3A": "c3a",
    "FOURIERFT": "fourierft",
}

_NO_WEIGHT = (
    "it changes no weight of the base, but what the model reads beside its input; there is nothing to convert"
)
_MERGE = "merge it with PEFT (merge_and_unload) and convert the full checkpoint (full_to_shira)"
# Why others are refused.
REFUSED = {
    "PROMPT_TUNING": _NO_WEIGHT,
    "MULTITASK_PROMPT_TUNING": _NO_WEIGHT,
    "P_TUNING": _NO_WEIGHT,
    "PREFIX_TUNING": _NO_WEIGHT,
    "CPT": _NO_WEIGHT,
    "CARTRIDGE": _NO_WEIGHT,
    "ADAPTION_PROMPT": "it adds attention to trained prompts, and changes no weight of the base; there is nothing to convert",
    "SHIRA": "PEFT's SHiRA is sparse already: convert it with peft_to_shira",
    "SUPERTUNING": "PEFT's Supertuning is sparse already: convert it with peft_to_shira",
    "XLORA": "it mixes several LoRAs anew for each input, which no change of weights can do",
    "POLY": "it mixes several LoRAs by task, which no single change of weights can do",
    "LILY": "a router mixes its factors anew for each input, which no change of weights can do",
    "SHADOW": "it runs a second network beside the model, and is no change of weights",
    "PVERA": f"it draws random numbers while it runs; its mean is a change of weights: {_MERGE}",
    "PEANUT": f"its change is a network's output for the weight: {_MERGE}",
    "BONE": "PEFT 0.18 and later call it MISS and no longer read it: merge it with the version that wrote it "
    "(merge_and_unload) and convert the full checkpoint (full_to_shira)",
    "ADAMSS": f"it splits the base's weights by their singular vectors and clusters, which are not in the files: {_MERGE}",
    "FROD": f"it replaces the weights by products that are not in the files: {_MERGE}",
    "OSF": f"it needs the singular vectors of the base's weights, which are not in the files: {_MERGE}",
    "PSOFT": f"it needs the singular vectors of the base's weights, which are not in the files: {_MERGE}",
    "TINYLORA": f"it needs the singular vectors of the base's weights, which are not in the files: {_MERGE}",
    "UNILORA": f"its factors come from a random projection that is not supported: {_MERGE}",
    "WAVEFT": f"its wavelets are not supported: {_MERGE}",
    "DEFT": f"it projects the base's weights in a way that is not supported: {_MERGE}",
}


def tuner(kind: str) -> Tuner:
    """The tuner of a ``peft_type`` in :data:`TUNERS`."""
    found: Tuner = import_module(f"{__name__}.{TUNERS[kind]}").TUNER
    return found
