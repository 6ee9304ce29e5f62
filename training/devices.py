"""What computes: devices, processes and precision as `accelerate` sets them, and what the processor is good at."""

from __future__ import annotations

import logging
import os
import platform

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

from multisubject.training.config import TrainConfig

logger = logging.getLogger(__name__)

# In oneDNN's names of the instruction sets that it may be held to: those that multiply in bfloat16, or no limit.
_WITH_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AVX512-BF16, AMX, Arm's BF16), faster than in float32.

    Others imitate it: a matrix product took three times as long with AVX-512 alone, forty times with AVX2. It is up to
    oneDNN, so `ONEDNN_MAX_CPU_ISA` is heeded; torch's own `ATEN_CPU_CAPABILITY` has no say in these products.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    held_to = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT").upper()
    if not any(name in held_to for name in _WITH_BFLOAT16):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # There oneDNN also means processors on which it can do without.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(test() for name in tests if (test := getattr(torch.cpu, name, None)))


def quick_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype to draw in on that device: float16 on a GPU, bfloat16 on a processor that has it, else float32."""
    if torch.device(device).type != "cpu":
        return torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def is_imitated(precision: str | None) -> bool:
    """Whether this run's device only imitates that mixed precision (`no`, `fp16`, `bf16`), many times slower than it
    computes in float32."""
    on_cpu = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device.type == "cpu"  # as `Accelerator` has it
    return on_cpu and (precision == "fp16" or (precision == "bf16" and not cpu_has_bfloat16()))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and precision as `accelerate` sets them, unless the configuration says otherwise.

    A precision that the processor only imitates is replaced by float32, and a warning says so.
    """
    mixed_precision = config.mixed_precision
    wanted = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if is_imitated(wanted):
        mixed_precision = "no"
        if PartialState().is_main_process:
            logger.warning(
                "--mixed_precision (or `accelerate config`): %s, which this processor only imitates, many times slower "
                "than float32; computing in float32 (--mixed_precision no) instead.",
                wanted,
            )
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir,
        # The learners' buffers are frozen embeddings: every process has the same ones.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps: {config.gradient_accumulation_steps}, but the environment variable "
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS or the DeepSpeed configuration says "
            f"{accelerator.gradient_accumulation_steps}; unset it or pass the same number."
        )
    if config.report_to not in (None, "all") and not accelerator.log_with:
        raise ImportError(f"--report_to {config.report_to}: not installed; `pip install {config.report_to}`.")
    return accelerator
