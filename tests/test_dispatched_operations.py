"""How many operations a step asks of the processor: on a GPU each costs time, whatever it computes.

A guided step of the default method asks for fewer than a plain one: keys of the prompt are kept from step to step, a
projection is one matrix product and no reshapes around it, and that is more than the bias adds.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from multisubject.benchmarks.speed import LAYOUT, PROMPT, guided_pipeline, random_pipeline


class Counter(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(pipe: Any, **arguments: Any) -> list[int]:
    """Operations of the second and the third of four steps: the UNet on both halves of the batch, guidance, scheduler.

    The first fills what is kept, and schedulers end in their own way.
    """
    counter, ends = Counter(), []

    def end_of_step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        ends.append(counter.count)
        return kwargs

    pipe.set_progress_bar_config(disable=True)
    with counter:
        pipe(PROMPT, num_inference_steps=4, output_type="latent", callback_on_step_end=end_of_step, **arguments)
    return [ends[1] - ends[0], ends[2] - ends[1]]


@pytest.mark.parametrize(("model", "share"), [("sd15", 1.0), ("sdxl", 0.9)])
def test_a_guided_step_asks_for_fewer_operations_than_a_plain_one(model, share):
    """On the released models' structure, layer for layer, with thin layers. Of XL's 140 attention layers half read the
    prompt, so that more is saved there: a tenth at least."""
    plain = random_pipeline(model, width=32, latent_size=16)
    expected, same = operations(plain)
    guided, kept = operations(guided_pipeline(plain), layout=LAYOUT)
    print(f"{model}: {guided} operations in a guided step, {expected} in a plain one")  # pytest -rP shows it
    assert expected == same and guided == kept
    assert guided < share * expected


def test_a_lora_in_its_region_asks_for_no_more_operations_than_everywhere():
    """What says where it acts takes the place of what scales it; two LoRAs of all attention layers, two regions."""
    from peft import LoraConfig

    pipe = guided_pipeline(random_pipeline("sd15", width=32, latent_size=16))
    for name in ("one", "other"):
        config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        pipe.unet.add_adapter(config, name)
    pipe.set_adapters(["one", "other"])
    everywhere = operations(pipe, layout=LAYOUT)[1]
    layout = [
        {"subject": subject, "box": box, "lora": lora}
        for (subject, box), lora in zip(LAYOUT.items(), ("one", "other"), strict=False)
    ]
    in_regions = operations(pipe, layout=layout)[1]
    print(f"{in_regions} operations with LoRAs in regions, {everywhere} with the same everywhere")
    assert in_regions <= everywhere
