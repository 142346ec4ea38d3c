"""A classifier on a pretrained encoder, trained in a bare loop: tokenised once, without dropout, the same for all methods."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 8
HEAD_STEPS, HEAD_RATE = 100, 1e-2  # on all features at once
HEAD_LATER = 1e-3  # while the encoder is trained too
_EVALUATED = 50  # texts at a time
PIECE = 8  # steps of which the mean loss is kept


@dataclass(frozen=True)
class Tokens:
    """Texts as the model takes them: ``ids`` and ``mask`` ``[N, length]``, ``labels`` ``[N]``, int64."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: Any) -> Tokens:
        """Some of the texts, without columns that are padding in all of them."""
        mask = self.mask[at]
        longest = int(mask.sum(1).max())
        return Tokens(self.ids[at][:, :longest], mask[:, :longest], self.labels[at])

    def batches(self, size: int) -> Iterator[Tokens]:
        """All texts, in order."""
        for start in range(0, len(self), size):
            yield self[slice(start, start + size)]


def tokenize(tokenizer: Any, pairs: Sequence[tuple[str, int]], length: int) -> Tokens:
    """Texts and labels as tokens, cut to ``length``, padded on the right."""
    found = tokenizer(
        [text for text, _ in pairs], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )
    return Tokens(found["input_ids"], found["attention_mask"], torch.tensor([label for _, label in pairs]))


def load_model(folder: Path) -> nn.Module:
    """The pretrained encoder with a head of two classes, in evaluation mode: without dropout."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    speaks: Any = logging
    speaks.set_verbosity_error()  # it would say that the head is new
    speaks.disable_progress_bar()
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    return model.requires_grad_(False)


def logits_of(model: nn.Module, batch: Tokens) -> Tensor:
    """``[texts, classes]``."""
    found: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    return found


def loss_of(model: nn.Module, batch: Tokens) -> Tensor:
    """The mean cross-entropy of the labels."""
    return nn.functional.cross_entropy(logits_of(model, batch), batch.labels)


def drawn_loss(seed: int) -> Any:
    """The mean cross-entropy of labels that are drawn from the model's own outputs."""
    draws = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: Tokens) -> Tensor:
        logits = logits_of(model, batch)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draws)[:, 0]
        return nn.functional.cross_entropy(logits, labels)

    return loss


def order(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The texts of each step, going through all of them in a new order each time round."""
    draws = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(queue) < min(BATCH, count):
            queue = torch.randperm(count, generator=draws)
        yield queue[:BATCH]
        queue = queue[BATCH:]


def with_head(model: nn.Module, tokens: Tokens, seed: int) -> nn.Module:
    """A copy of the model whose head is drawn by the seed and then fitted to these texts, with the encoder as it is."""
    made = copy.deepcopy(model)
    head: Any = made.get_submodule("classifier")
    draws = torch.Generator().manual_seed(seed)
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    with torch.no_grad():
        head.weight.normal_(0, 0.02, generator=draws)
        head.bias.zero_()
        for batch in tokens.batches(_EVALUATED):
            logits_of(made, batch)
    handle.remove()
    features = torch.cat(inputs)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE, weight_decay=0)
    for _ in range(HEAD_STEPS):
        nn.functional.cross_entropy(head(features), tokens.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return made


@dataclass(frozen=True)
class Course:
    """How a training went.

    Attributes:
        train: the mean loss of each :data:`PIECE` steps.
        watched: the loss on other texts, halfway and at the end.
    """

    train: list[float]
    watched: list[float | None]


def train(
    model: nn.Module,
    parameters: Sequence[Tensor],
    tokens: Tokens,
    watched: Tokens,
    *,
    steps: int,
    rate: float,
    seed: int,
    after: Callable[[int], None] = lambda _: None,
) -> Course:
    """Train the parameters and the head: AdamW without decay, a tenth of the steps to warm up, then a linear descent.

    Args:
        model: in evaluation mode.
        parameters: what the method trains; the head beside them has a rate of its own, :data:`HEAD_LATER`, the same in all runs.
        tokens: to train on.
        watched: of which the loss is kept halfway and at the end.
        steps: of :data:`BATCH` texts.
        rate: of the parameters at the peak.
        seed: of the order of the texts.
        after: called after each step with the number of steps done.
    """
    head = list(model.get_submodule("classifier").parameters())
    for parameter in head:
        parameter.requires_grad_(True)
    groups = [{"params": list(parameters), "lr": rate}, {"params": head, "lr": HEAD_LATER}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )
    losses: list[float] = []
    seen: list[float | None] = []
    for at in order(len(tokens), steps, seed):
        loss = loss_of(model, tokens[at])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*parameters, *head], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(len(losses))
        if len(losses) in (steps // 2, steps):
            seen.append(score(model, watched).loss)
    pieces = [losses[start : start + PIECE] for start in range(0, steps, PIECE)]
    return Course([round(sum(piece) / len(piece), 4) for piece in pieces], seen)


@dataclass(frozen=True)
class Score:
    """How a model does on texts.

    Attributes:
        loss: mean cross-entropy; None where training has diverged.
        right: of each text, whether its label is the likelier one.
    """

    loss: float | None
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of the texts."""
        return sum(self.right) / len(self.right)


@torch.no_grad()
def score(model: nn.Module, tokens: Tokens) -> Score:
    """Loss and accuracy on texts."""
    logits = torch.cat([logits_of(model, batch) for batch in tokens.batches(_EVALUATED)])
    loss = float(nn.functional.cross_entropy(logits, tokens.labels))
    return Score(round(loss, 5) if math.isfinite(loss) else None, (logits.argmax(-1) == tokens.labels).tolist())


def quiet() -> None:
    """What PEFT and transformers warn of does not concern a study."""
    warnings.filterwarnings("ignore", module="(peft|transformers).*")
