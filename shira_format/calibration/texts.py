"""Texts and a model of transformers from a folder, to gather what the model's layers are fed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format import SourceError
from shira_format._core.optional import optional_import
from shira_format.names.filters import name_filter

_LONGEST = 1 << 24  # characters of a line, more than any text that a model takes


@dataclass(frozen=True)
class Texts:
    """Texts of a file, and how many of its lines were empty and left out."""

    texts: list[str]
    empty: int


def read_texts(path: Path, *, field: str = "text", limit: int | None = None) -> Texts:
    """The texts of a file in UTF-8: one a line, or of ``.jsonl`` the ``field`` of the object in each line.

    Args:
        path: the file.
        field: of the objects.
        limit: read no more than so many texts.

    Raises:
        SourceError: not UTF-8, a line that is not what it should be, or no text; names file, line and rule.
        OSError: it cannot be read.
    """
    found: list[str] = []
    empty = 0
    objects = path.suffix.lower() == ".jsonl"
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number in range(1, 1 << 62):
                if (limit is not None and len(found) == limit) or not (line := lines.readline(_LONGEST)):
                    break
                if len(line) == _LONGEST:
                    raise SourceError(f"{path}: line {number} has {_LONGEST} characters or more")
                text = _field(line, field, f"{path}: line {number}") if objects and line.strip() else line
                if text.strip():
                    found.append(text.strip())
                else:
                    empty += 1
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error.reason} near byte {error.start}") from None
    if not found:
        raise SourceError(f"{path}: holds no text")
    return Texts(found, empty)


def _field(line: str, field: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise SourceError(f"{where} is not JSON") from None
    text = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise SourceError(f"{where} is no object with a text in {field!r}")
    return text


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer.

    Attributes:
        model: on the CPU, in the dtype of its files.
        tokenizer: of the same folder.
        longest: the most tokens that a text may have; None if neither model nor tokenizer says.
        random: weights that the folder does not have and that are random therefore, by the model's names.
    """

    model: Any
    tokenizer: Any
    longest: int | None
    random: tuple[str, ...]


def load_model(folder: Path, *, causal: bool = False) -> Loaded:
    """The model and the tokenizer of a local folder, by transformers; no code of the folder is run, nothing is downloaded.

    The class is the one that the folder's config names in ``architectures``, so that weights are called as in the folder's
    files; ``AutoModel`` if transformers has no such class.

    Args:
        folder: with ``config.json``, weights and tokenizer.
        causal: as ``AutoModelForCausalLM`` instead.

    Raises:
        SourceError: torch or transformers is missing; no folder; transformers cannot load it; weights of its blocks are missing.
    """
    with optional_import("running a model needs torch and transformers", "demo"):
        import torch  # noqa: F401 - transformers is there without it, and then has no models
        import transformers
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    with _silent(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            made = _class(transformers, config, causal=causal)
            model, info = made.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SourceError(f"{folder}: transformers cannot load it: {reason}") from error
    random = sorted(map(str, info["missing_keys"]))
    # A head that is random gets the right inputs all the same; a block would spoil those of all that follow.
    if inner := [name for name in random if re.search(r"(^|\.)\d+\.", name)]:
        raise SourceError(
            f"{folder}: {len(inner)} weights of {type(model).__name__} are not there, such as {inner[0]!r}; "
            "a random model's moments say nothing"
        )
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    # A tokenizer that knows no limit says 10^30.
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
    return Loaded(model, tokenizer, min(known, default=None), tuple(random))


def _class(transformers: Any, config: Any, *, causal: bool) -> Any:
    if causal:
        return transformers.AutoModelForCausalLM
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else transformers.AutoModel


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without transformers' reports and bars, of which what matters is told by us."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging = transformers.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def batches(tokenizer: Any, texts: Sequence[str], *, batch: int, length: int) -> Iterator[Any]:
    """The texts as the tokenizer's tensors, those of like length together, cut after ``length`` tokens.

    A tokenizer without a padding token pads with its last token, which is masked out anyway.

    Raises:
        SourceError: more than one text at a time, and nothing to pad with.
    """
    if tokenizer.pad_token is None and batch > 1:
        if tokenizer.eos_token is None:
            raise SourceError("the tokenizer has no token to pad with: give it one text at a time")
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        yield tokenizer(
            [texts[i] for i in order[start : start + batch]],
            padding=batch > 1, truncation=True, max_length=length, return_tensors="pt",
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Layers to watch.

    Attributes:
        modules: by the model's names.
        weights: from the model's names of their weights to those of the checkpoint.
        strange: weights of layers that could be watched, but that the checkpoint does not have (such as a head that is tied to the
            embedding).
    """

    modules: list[str]
    weights: dict[str, str]
    strange: list[str]


def choose(model: Any, names: Collection[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Chosen:
    """The layers of ``model`` whose weights the checkpoint has and the regexes choose.

    A model and the file that it was saved to may differ in a prefix, as ``bert.``; adapters have the file's names.

    Args:
        model: of transformers.
        names: of the checkpoint's tensors.
        include: regexes; a weight is taken only if one of them is found in its name in the checkpoint.
        exclude: regexes; a weight is left out if one of them is found in it.

    Raises:
        SourceError: no layer is left, or not a regular expression.
    """
    from shira_format.calibration.layers import watchable

    wanted = name_filter(include, exclude)
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    found = Chosen([], {}, [])
    for module, layer in model.named_modules():
        if not watchable(layer):
            continue
        weight = f"{module}.weight"
        known = next((n for n in (weight, weight.removeprefix(prefix), prefix + weight) if n in names), None)
        if known is None or known in found.weights.values():
            found.strange.append(weight)
        elif wanted(known):
            found.modules.append(module)
            found.weights[weight] = known
    if not found.modules:
        raise SourceError("no layer of the model is left by the choice of names")
    return found
