"""One pipeline of diffusers, two styles: an adapter changes both its UNet and its text encoder.

    python examples/diffusers_switching.py

Needs ``pip install diffusers`` and the extra ``demo``. The pipeline is a toy with the parts of Stable Diffusion and random
weights, so that nothing is downloaded; what it paints is noise, but each style's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as messages
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as parts

import shira_format as shira

STYLES = ("ink", "oil")
WORDS = torch.tensor([[1, 5, 9, 2]])  # a prompt, as its tokenizer would give it


def main() -> None:
    """Make a pipeline and two fine-tunes of it, keep 2 % of what these changed, and switch between them."""
    for spoken in (messages, parts):
        spoken.set_verbosity_error()
        spoken.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = toy_pipeline()
        pipeline.save_pretrained(folder / "base")
        for seed, style in enumerate(STYLES, 1):
            fine_tuned(folder / "base", seed).save_pretrained(folder / style)
            shira.full_to_shira(folder / style, folder / "base", folder / f"{style}.st", density=0.02)

        # To compare with: a checkpoint of the whole pipeline for each style.
        alone = {}
        for style in STYLES:
            shira.shira_to_full(folder / f"{style}.st", folder / "base", folder / f"{style}-whole")
            alone[style] = picture(loaded(folder / f"{style}-whole"))
        plain = picture(pipeline)

        switcher = shira.Switcher(pipeline, pool=shira.AdapterPool(folder))
        for style in ("ink", "oil", "ink", "ink", "oil"):
            report = switcher.switch(style)
            found = picture(pipeline)
            assert torch.equal(found, alone[style]), style
            assert not torch.equal(found, plain)
            print(
                f"{style}: {report.entries} entries of {report.tensors} weights; mean brightness {found.mean():.4f}"
            )
        both = switcher.set([("ink", 0.7), ("oil", 0.5)])
        assert not any(torch.equal(picture(pipeline), one) for one in alone.values())
        print(f"ink at 0.7 and oil at 0.5: {both.overlapping} of {both.entries} entries are changed by both")
        switcher.revert()
        assert torch.equal(picture(pipeline), plain)
        print("each picture equals that of a pipeline of its own, and the base is as it was, bit for bit")


def toy_pipeline() -> Any:
    """All parts of Stable Diffusion but the tokenizer, tiny."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4)
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    return quiet(StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(text), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ))  # fmt: skip


def loaded(folder: Path) -> Any:
    """A pipeline that was saved."""
    return quiet(
        StableDiffusionPipeline.from_pretrained(
            folder, tokenizer=None, safety_checker=None, feature_extractor=None
        )
    )


def quiet(pipeline: Any) -> Any:
    """Without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fine_tuned(folder: Path, seed: int) -> Any:
    """What stands for training: a little noise on all matrices of the UNet and the text encoder."""
    pipeline = loaded(folder)
    random = torch.Generator().manual_seed(seed)
    for part in (pipeline.unet, pipeline.text_encoder):
        for weight in part.parameters():
            if weight.ndim > 1:
                weight.data += 0.05 * torch.randn(weight.shape, generator=random)
    return pipeline


def picture(pipeline: Any) -> torch.Tensor:
    """The same prompt and the same noise each time, ``[1, 3, height, width]``."""
    with torch.no_grad():
        prompt = pipeline.text_encoder(WORDS).last_hidden_state
    found: torch.Tensor = pipeline(
        prompt_embeds=prompt, guidance_scale=1.0, num_inference_steps=3, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return found


if __name__ == "__main__":
    main()
