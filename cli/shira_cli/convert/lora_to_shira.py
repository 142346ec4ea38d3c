"""``shira-convert lora_to_shira``."""

from __future__ import annotations

from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert import fitting, running

EXAMPLE = """
examples:
  shira-convert lora_to_shira my-lora/ --base my-model/ -o adapter.st --density 0.02
  shira-convert lora_to_shira my-lora/ --base my-model/ -o adapter.st --fit distill --texts texts.jsonl --keep 0.95
"""


@click.command("lora_to_shira", cls=app.Command, example=EXAMPLE)
@click.argument("lora", metavar="LORA")
@options.base_option(" that the LoRA was made for", required=True)
@options.selection_options
@fitting.fit_options(needed=False)
@options.filters("Convert")
@options.dialect_option
@options.base_prefix_option
@options.scale_options
@options.allow_unused_option
@running.work_options
def command(lora: str, base: str, dialect: str | None, scope: str | None, **settings: Any) -> int:
    """Convert a LoRA to a sparse adapter: the largest entries of its update, as exact values of the tuned weights.

    The largest entries alone keep little of what a LoRA does. With --fit, entries and values are chosen so that the model
    does what it does with the LoRA, on texts that you give; what is kept is measured on others. This runs the base.

    LORA is a file, a folder or hf://owner/name. The dialect is detected from the file's keys:

    \b
      peft       adapter_config.json with adapter_model.safetensors or .bin: LoRA, DoRA,
                 embeddings, convolutions, experts; OFT, (IA)^3 and other tuners
      diffusers  pytorch_lora_weights.safetensors, current and older key names
      kohya      lora_down and lora_up, under any prefix: sd-scripts, OneTrainer, ComfyUI
      lycoris    LoCon, LoHa, LoKr, full differences, dora_scale, OFT, BOFT, (IA)^3
      xlabs      FLUX LoRAs of x-flux
      mlx        mlx-lm's adapters.safetensors
      gguf       llama.cpp's adapters
      torchtune  adapter_model.pt

    LoRAs of a UNet and its text encoders need the pipeline (the folder with model_index.json) as base. A key that
    matches no weight of the base is an error.
    """  # noqa: D301 - click reads the \b as an unwrapped paragraph
    from shira_format.convert.lora import lora_to_shira
    from shira_format.lora import DIALECTS

    if dialect is not None and dialect not in DIALECTS:
        raise click.UsageError(f"--dialect {dialect!r} is not one of {', '.join(DIALECTS)}")
    method, given, settings = fitting.split(settings)
    if method != "none":
        fitting.check(method, given, settings | {"scope": scope})
        return fitting.run(
            "fit_lora", lora, base, method=method, given=given, dialect=dialect, **fitting.without(settings)
        )
    running.one_amount(**{amount: settings[amount] for amount in ("density", "top_k", "energy")})
    return running.convert(lora_to_shira, lora, base, dialect=dialect, scope=scope or "tensor", **settings)
