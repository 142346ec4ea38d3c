"""The sources of the study of fits, each with its live model and texts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shira_analysis.measures.classifier import LabelledTexts
from shira_cli.shipped import DATA
from shira_format.calibration.texts import batches, by_length, read_texts
from shira_format.convert.fit.live import load_base
from shira_format.convert.fit.sources import source_weights
from shira_format.convert.fit.task import Task, blocks_of
from shira_format.convert.full import FullConversion
from shira_format.convert.inputs import ConversionInputs
from shira_format.convert.lora import LoraConversion
from studies import fit_language
from studies.fits import BATCH, LANGUAGE, LORAS, TOKENS, TUNED
from studies.learning import quiet

LIMIT: int | None = None  # texts of each part; all, but for a test


@dataclass
class _Places:
    """Where the models are, and the LoRA of the language model."""

    base: Path = Path()
    tuned: Path = Path()
    language: Path = Path()
    language_lora: Path = Path()


_places = _Places()


def find_tuned() -> Path:
    """The fine-tune, from the package that ships it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("sre_embedding_model")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the fine-tune is not installed: pip install --no-deps sre-embedding-model==1.0.0")
    return Path(spec.submodule_search_locations[0]) / "model_weights"


def start(base: Path, tuned: Path, language: Path, language_lora: Path) -> None:
    """Before the first run: where the models are, and the LoRA of the language model."""
    quiet()
    torch.set_num_threads(1)
    _places.base, _places.tuned, _places.language, _places.language_lora = base, tuned, language, language_lora


@dataclass(frozen=True)
class Source:
    """A source with its model and texts.

    Attributes:
        task: with all texts.
        labels: of a classifier's held-out texts, in the order of the batches; None of others.
        names: the adapter's names of weights by the model's.
        bytes: of its own file.
    """

    task: Task
    labels: Any
    names: dict[str, str]
    bytes: int


@lru_cache(maxsize=1)
def source_of(name: str) -> Source:
    """A source by name; the last one is kept."""
    inputs, folder = _opened(name)
    live = load_base(inputs)
    source = source_weights(inputs, live.model, vectors=True)
    train, held, labels = _texts(name)

    def batched(some: list[str]) -> list[Any]:
        return [dict(one) for one in batches(live.tokenizer, some, batch=BATCH, length=TOKENS)]

    task = Task(
        live.model, source.sparse, source.whole, batched(train), batched(held), live.outputs, live.is_logits, live.is_causal,
        blocks_of(live.model), source.dtypes,
    )  # fmt: skip
    size = sum(one.stat().st_size for one in folder.rglob("*.safetensors"))
    return Source(task, None if labels is None else labels[by_length(held)], source.names, size)


def _opened(name: str) -> tuple[ConversionInputs, Path]:
    """The source's conversion, and the folder of its own files."""
    if name == TUNED:
        return FullConversion(str(_places.tuned), str(_places.base)).open(), _places.tuned
    base, folder = (
        (_places.language, _places.language_lora) if name == LANGUAGE else (_places.base, DATA / "loras" / name)
    )
    return LoraConversion(str(folder), str(base)).open(), folder


def _texts(name: str) -> tuple[list[str], list[str], Any]:
    """Texts to fit on, held-out ones, and a classifier's labels of these."""
    if name == LANGUAGE:
        return fit_language.passages("train", LIMIT), fit_language.passages("held", LIMIT), None
    parts = LORAS if name == TUNED else (name,)
    train = [
        text for part in parts for text in read_texts(DATA / "text" / f"{part}-train.jsonl", limit=LIMIT).texts
    ]
    held = [LabelledTexts.read(DATA / "text" / f"{part}.jsonl") for part in parts]
    texts = [text for one in held for text in one.texts[:LIMIT]]
    return train, texts, None if name == TUNED else np.concatenate([one.labels[:LIMIT] for one in held])
