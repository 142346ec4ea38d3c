"""Calibration texts, and the model and layers that they are run through."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format._core.files import digested
from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.names.filters import name_filter

_LONGEST = 1 << 24  # characters of a line


@dataclass(frozen=True)
class Texts:
    """Texts of a file.

    Attributes:
        texts: in its order.
        empty: the number of empty lines that were skipped.
        labels: of the texts, if they were asked for.
        digest: SHA-256 of the whole file, from which the texts were read.
    """

    texts: list[str]
    empty: int
    labels: list[str]
    digest: str


def read_texts(path: Path, *, field: str = "text", limit: int | None = None, labelled: bool = False) -> Texts:
    """The texts of a UTF-8 file: one per line, or in a ``.jsonl`` file the ``field`` of the object in each line.

    Args:
        path: the file.
        field: of the objects.
        limit: read at most this many texts.
        labelled: each object has a ``label``, a text or an integer.

    Raises:
        SourceError: not UTF-8, an invalid line, or no text; names file, line and rule.
        OSError: it cannot be read, or changes meanwhile.
    """
    objects = path.suffix.lower() == ".jsonl"
    if labelled and not objects:
        raise SourceError(f"{path}: a classifier needs labels: give .jsonl with objects of 'text' and 'label'")
    found: list[str] = []
    labels: list[str] = []
    empty = 0
    try:
        with digested(path) as (file, digest):
            lines = io.TextIOWrapper(file, "utf-8-sig")
            for number in range(1, 1 << 62):
                if (limit is not None and len(found) == limit) or not (line := lines.readline(_LONGEST)):
                    break
                where = f"{path}: line {number}"
                if len(line) == _LONGEST:
                    raise SourceError(f"{where} has {_LONGEST} characters or more")
                entry = _object(line, where) if objects and line.strip() else None
                text = line if entry is None else _field(entry, field, where)
                if not text.strip():
                    empty += 1
                    continue
                found.append(text.strip())
                if labelled and entry is not None:
                    labels.append(_label(entry, where))
            lines.detach()  # or it would close the file
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error.reason} near byte {error.start}") from None
    if not found:
        raise SourceError(f"{path}: holds no text")
    return Texts(found, empty, labels, digest)


def _object(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise SourceError(f"{where} is not JSON") from None


def _field(entry: Any, field: str, where: str) -> str:
    text = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise SourceError(f"{where} is no object with a text in {field!r}")
    return text


def _label(entry: dict[str, Any], where: str) -> str:
    label = entry.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise SourceError(f"{where} has no 'label' that is a text or an integer")
    return str(label)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        model: on the CPU, in the dtype of its files.
        tokenizer: from the same folder.
        longest: the maximum number of tokens; None if neither model nor tokenizer states it.
        random: weights that the folder lacks and that are therefore random, by the model's names.
    """

    model: Any
    tokenizer: Any
    longest: int | None
    random: tuple[str, ...]


def load_model(folder: Path, *, causal: bool = False) -> LoadedModel:
    """Load a local folder with transformers; no code in it is run, nothing is downloaded.

    The class is the one in ``architectures`` of the config, so that weights have the names of the folder's files;
    ``AutoModel`` if transformers has no such class.

    Args:
        folder: with ``config.json``, weights and tokenizer.
        causal: use ``AutoModelForCausalLM`` instead.

    Raises:
        SourceError: torch or transformers is missing; not a folder; transformers cannot load it; weights of its blocks are
            missing.
    """
    with optional_import("running a model needs torch and transformers", "demo"):
        import torch  # noqa: F401 - transformers is there without it, and then has no models
        import transformers
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    check_regular(folder)
    with silent(transformers):
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
    # A random head still has the right inputs; a random block would spoil those of all later ones.
    if inner := [name for name in random if re.search(r"(^|\.)\d+\.", name)]:
        raise SourceError(
            f"{folder}: {len(inner)} weights of {type(model).__name__} are missing, such as {inner[0]!r}; "
            "moments of a random model are meaningless"
        )
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    # A tokenizer without a limit has 10^30.
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
    return LoadedModel(model, tokenizer, min(known, default=None), tuple(random))


def check_regular(folder: Path) -> None:
    """Raise SourceError if a folder holds a pipe or a device, which transformers would wait for, or read for ever."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir() and not path.is_file():
            raise SourceError(f"{path}: not a regular file")


def _class(transformers: Any, config: Any, *, causal: bool) -> Any:
    if causal:
        return transformers.AutoModelForCausalLM
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else transformers.AutoModel


@contextlib.contextmanager
def silent(transformers: Any) -> Iterator[None]:
    """Suppress transformers' reports and progress bars."""
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


def by_length(texts: Sequence[str]) -> list[int]:
    """The positions of texts in the order in which :func:`batches` takes them: the shortest first."""
    return sorted(range(len(texts)), key=lambda i: len(texts[i]))


def batches(tokenizer: Any, texts: Sequence[str], *, batch: int, length: int) -> Iterator[Any]:
    """The tokenized texts, grouped by similar length and truncated to ``length`` tokens.

    A tokenizer without a padding token pads with its end-of-sequence token, which is masked out anyway.

    Raises:
        SourceError: batches of several texts, and no token to pad with.
    """
    if tokenizer.pad_token is None and batch > 1:
        if tokenizer.eos_token is None:
            raise SourceError("the tokenizer has no token to pad with: use a batch size of 1")
        tokenizer.pad_token = tokenizer.eos_token
    order = by_length(texts)
    for start in range(0, len(order), batch):
        yield tokenizer(
            [texts[i] for i in order[start : start + batch]],
            padding=batch > 1, truncation=True, max_length=length, return_tensors="pt",
        )  # fmt: skip


@dataclass(frozen=True)
class ChosenLayers:
    """Layers to watch.

    Attributes:
        modules: by the model's names.
        weights: the checkpoint's names of their weights, by the model's.
        unknown: weights of layers that could be watched but are not in the checkpoint (such as a head that is tied to the
            embedding).
    """

    modules: list[str]
    weights: dict[str, str]
    unknown: list[str]


def names_in_files(model: Any, names: Collection[str]) -> Callable[[str], str | None]:
    """What gives the checkpoint's name of a model's parameter, which may lack a prefix such as ``bert.`` or have it in addition;
    None if the checkpoint has neither.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    return lambda name: next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)


def choose_layers(
    model: Any, names: Collection[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> ChosenLayers:
    """The layers of ``model`` whose weights the checkpoint has and the regexes choose.

    Names in a model and in its file may differ in a prefix such as ``bert.``; adapters have the file's names.

    Args:
        model: of transformers.
        names: of the checkpoint's tensors.
        include: regexes; a weight is taken only if one of them is found in its name in the checkpoint.
        exclude: regexes; a weight is skipped if one of them is found in it.

    Raises:
        SourceError: no layer is left, or not a regular expression.
    """
    from shira_format.calibration.layers import can_watch

    wanted, in_files = name_filter(include, exclude), names_in_files(model, names)
    found = ChosenLayers([], {}, [])
    for module, layer in model.named_modules():
        if not can_watch(layer):
            continue
        weight = f"{module}.weight"
        known = in_files(weight)
        if known is None or known in found.weights.values():
            found.unknown.append(weight)
        elif wanted(known):
            found.modules.append(module)
            found.weights[weight] = known
    if not found.modules:
        raise SourceError("no layer of the model is left by include and exclude")
    return found
