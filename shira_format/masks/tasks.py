"""Losses of texts for gradients: a causal language model's own, and that of a classifier on mean-pooled hidden states."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shira_format.calibration.texts import LoadedModel, batches, by_length, load_model, names_in_files, read_texts
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.masks.gradients import Loss
from shira_format.masks.make import Calibration
from shira_format.masks.weights import Weight, weights_of_model
from shira_format.names.filters import name_filter

TASKS = ("causal", "classify")
_HEAD_STEPS = 100  # of the quasi-Newton method that fits the classifier
_RIDGE = 1e-3  # of its weights


@dataclass(frozen=True)
class TextTask:
    """A model, batches of texts and a loss.

    Attributes:
        loaded: the model and its tokenizer.
        batches: tokenized; read as often as needed.
        loss: of the model and a batch.
        digest: SHA-256 of the file of texts.
        texts: how many.
        labels: of ``classify``, in the order of their classes.
        empty: empty lines that are left out.
    """

    loaded: LoadedModel
    batches: list[Any]
    loss: Loss
    digest: str
    texts: int
    labels: tuple[str, ...] = ()
    empty: int = 0

    def calibration(self, at_once: int | None, progress: Any = lambda _: None) -> Calibration:
        """For :func:`shira_format.masks.make.mask_tensors`: weights that the loss does not depend on are left out."""
        return Calibration(
            self.loaded.model, self.batches, self.loss, at_once, self.digest, leave_out=True, progress=progress
        )


def text_task(
    model: Path,
    data: Path,
    task: str,
    *,
    limit: int | None = None,
    batch: int = 16,
    max_length: int = 512,
    own_outputs: bool = False,
    seed: int = 0,
) -> TextTask:
    """Load a model and texts.

    ``causal``: the mean cross-entropy of each next token. ``classify``: that of a linear classifier on the mean of the last hidden
    states of a text's tokens. The classifier is fitted to the unchanged model first (100 steps of L-BFGS from 0, with a ridge of
    0.001): one of zeros would pass no gradient on to the model, and a random one would pass on noise.

    Args:
        model: a folder that transformers loads, with its tokenizer; no code in it is run.
        data: ``.jsonl`` of objects with ``text`` and, for ``classify``, ``label`` (a text or an integer); for ``causal`` also one text
            a line.
        task: ``"causal"`` or ``"classify"``.
        limit: the first so many texts only.
        batch: texts at a time.
        max_length: tokens after which a text is cut.
        own_outputs: draw labels or next tokens from the model's own outputs instead, as the Fisher information has them.
        seed: of that draw.

    Raises:
        SourceError: torch or transformers is missing, or the model, the texts or the labels cannot be used.
        OSError: a file cannot be read.
    """
    texts = read_texts(data, limit=limit, labelled=task == "classify")
    labels = texts.labels
    if task == "classify" and texts.empty:
        raise SourceError(f"{data}: {texts.empty} lines have no text, only a label")
    loaded = load_model(model, causal=task == "causal")
    if loaded.random and task == "causal":
        raise SourceError(
            f"{model}: {len(loaded.random)} weights are missing, such as {loaded.random[0]!r}: its loss is meaningless"
        )
    length = min(max_length, loaded.longest or max_length)
    tokens = list(batches(loaded.tokenizer, texts.texts, batch=batch, length=length))
    digest = texts.digest
    if task == "causal":
        return TextTask(loaded, tokens, _causal(own_outputs, seed), digest, len(texts.texts), empty=texts.empty)
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise SourceError(f"{data}: all labels are {names[0]!r}; a classifier needs two or more")
    classes = [names.index(labels[i]) for i in by_length(texts.texts)]
    loss = _classifier(loaded.model, tokens, classes, len(names), own_outputs=own_outputs, seed=seed)
    starts = [sum(len(one["input_ids"]) for one in tokens[:number]) for number in range(len(tokens))]
    labelled = [
        dict(one) | {"classes": classes[start : start + len(one["input_ids"])]}
        for start, one in zip(starts, tokens, strict=True)
    ]
    return TextTask(loaded, labelled, loss, digest, len(texts.texts), names)


def weights_in_files(
    model: Any, checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Weight], list[str]]:
    """The weights of a live model that can be masked, under their names in the checkpoint that it comes from.

    Args:
        model: of transformers.
        checkpoint: its files.
        include: regexes on the checkpoint's names.
        exclude: likewise.

    Returns:
        The weights, and the model's names of those that the checkpoint does not have, such as a head that is not in it.

    Raises:
        SourceError: none is left, one has another shape in the checkpoint, or experts are stored in another way.
    """
    wanted, in_files = name_filter(include, exclude), names_in_files(model, set(checkpoint))
    found: dict[str, Weight] = {}
    unknown = []
    for weight in weights_of_model(model):
        name = in_files(weight.name)
        if name is None and weight.stacked and wanted(weight.name):
            raise SourceError(
                f"{checkpoint.path}: has no tensor {weight.name!r}, in which transformers stacks the experts that the files hold one by "
                "one: leave them out (--exclude experts), or make the mask of the live model in Python"
            )
        if name is None or name in found:
            unknown.append(weight.name)
        elif wanted(name):
            if checkpoint.shape(name) != weight.shape:
                raise SourceError(
                    f"{checkpoint.path}: tensor {name!r} has the shape {list(checkpoint.shape(name))}, and {list(weight.shape)} "
                    "in the model that transformers makes of it"
                )
            found[name] = replace(weight, name=name)
    if not found:
        raise SourceError("no weight of two dimensions or more is left by include and exclude")
    return list(found.values()), unknown


def _device(model: Any) -> Any:
    return next(model.parameters()).device


def own_loss(seed: int, *, causal: bool) -> Loss:
    """The mean cross-entropy of next tokens, or of a classifier's labels, that are drawn from the model's own outputs.

    Args:
        seed: of the draw, which depends on it and on the tokens of a batch alone.
        causal: next tokens; else the labels of transformers' classifiers, whose ``labels`` in a batch are not used.
    """
    import torch

    if causal:
        return _causal(own_outputs=True, seed=seed)

    def loss(model: Any, batch: Any) -> Any:
        logits = model(**_inputs(model, batch)).logits.float()
        return torch.nn.functional.cross_entropy(logits, _drawn(logits, batch, seed))

    return loss


def _inputs(model: Any, batch: Any) -> dict[str, Any]:
    """A batch on the model's device, without labels, of which the model would compute another loss."""
    return {key: value.to(_device(model)) for key, value in batch.items() if key not in ("labels", "classes")}


def _causal(own_outputs: bool, seed: int) -> Loss:
    import torch

    def loss(model: Any, batch: Any) -> Any:
        moved = _inputs(model, batch)
        logits = model(**moved).logits[:, :-1].float()
        labels = moved["input_ids"][:, 1:]
        if own_outputs:
            labels = _drawn(logits, batch, seed)
        counted = moved["attention_mask"][:, 1:] != 0
        if not bool(counted.any()):
            raise SourceError("a batch has no text of two tokens or more")
        return torch.nn.functional.cross_entropy(logits[counted], labels[counted])

    return loss


def _drawn(logits: Any, batch: Any, seed: int) -> Any:
    """One class for each row of ``[..., classes]``, drawn by the softmax; each batch has random numbers of its own."""
    import torch

    tokens = batch["input_ids"].cpu().numpy().tobytes()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} ".encode() + tokens))
    shares = logits.detach().softmax(-1).cpu().reshape(-1, logits.shape[-1])
    found = torch.multinomial(shares, 1, generator=generator)
    return found.reshape(logits.shape[:-1]).to(logits.device)


def _pooled(model: Any, batch: Any) -> Any:
    """The mean of the last hidden states over a text's tokens, ``[texts, hidden]`` float32."""
    moved = _inputs(model, batch)
    hidden = model(**moved, output_hidden_states=True).hidden_states[-1].float()
    mask = moved["attention_mask"][:, :, None].float()
    return (hidden * mask).sum(1) / mask.sum(1)


def _classifier(
    model: Any, tokens: Sequence[Any], classes: Sequence[int], count: int, *, own_outputs: bool, seed: int
) -> Loss:
    import torch

    model.eval()
    with torch.no_grad():
        features = torch.cat([_pooled(model, batch) for batch in tokens]).double().cpu()
    wanted = torch.tensor(list(classes))
    middle, spread = features.mean(0), features.std(0, correction=0).clamp_min(1e-12)
    weight = torch.zeros(count, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_HEAD_STEPS, line_search_fn="strong_wolfe")
    scaled = (features - middle) / spread

    def closure() -> Any:
        optimizer.zero_grad()
        value: Any = torch.nn.functional.cross_entropy(scaled @ weight.T + bias, wanted)
        value = value + _RIDGE * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    head = ((weight / spread).detach(), (bias - (weight / spread) @ middle).detach())

    def loss(model: Any, batch: Any) -> Any:
        pooled = _pooled(model, batch)
        inner, outer = (part.to(pooled) for part in head)
        logits = pooled @ inner.T + outer
        labels = (
            _drawn(logits, batch, seed) if own_outputs else torch.tensor(batch["classes"], device=logits.device)
        )
        return torch.nn.functional.cross_entropy(logits, labels)

    return loss
