"""Regions' LoRAs and reference pictures together: in half precision, offloaded and compiled, on tiny real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_equal_up_to_rounding
from test_region_ip_adapters import WIDTH, embeddings, load_adapters, with_encoder
from test_region_loras import LEFT, RIGHT, make_pipe, sample

RUN = 500


def layout(picture: Any) -> list[dict[str, Any]]:
    """All that a region may hold."""
    return [
        {"subject": "dog", "box": LEFT, "lora": "a", "negative_prompt": "hat"},
        {"prompt": "a red ball", "box": RIGHT, "lora": {"b": 0.5}, "ip_adapter_image": picture, "end": 0.6},
    ]


@pytest.fixture(params=["sd1", "xl"])
def make(request, tokenizer):
    """A pipeline with two LoRAs and an IP-Adapter, the same each time."""

    def build() -> Any:
        pipe = make_pipe(tokenizer, request.param)
        load_adapters(pipe)
        return with_encoder(pipe)

    return build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_whole_one(make, dtype):
    """What regions hold changes the picture by far more than the precision does."""
    pipe, held = make(), layout(embeddings(1))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = sample(pipe, layout=held, latents=latents)
    nothing = [{"box": RIGHT, "ip_adapter_image": torch.zeros(1, 1, WIDTH)}]  # the adapter wants a picture
    changed = (expected - sample(pipe, layout=nothing, latents=latents)).abs().mean()
    found = sample(pipe.to(dtype), layout=held, latents=latents.to(dtype))
    assert found.dtype == dtype and found.isfinite().all()
    assert (found.float() - expected).abs().mean() < 0.2 * changed


def test_offloading_changes_nothing(make):
    """With accelerate's real hooks, which move the models from the CPU to the CPU. That of single layers, which needs a
    GPU: test_gpu.py."""
    offloaded, held = make(), layout(embeddings(1))
    offloaded.enable_model_cpu_offload(device="cpu")
    expected = sample(make(), layout=held)
    for _ in range(2):
        assert_equal_up_to_rounding(sample(offloaded, layout=held), expected, RUN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "backend"), [("sd1", "eager"), ("sd1", "aot_eager"), ("xl", "eager")], indirect=["make"]
)
def test_a_compiled_unet_is_one_graph_while_the_same_regions_guide(make, backend):
    """A second run compiles nothing anew; one graph more is for the steps after a region's end."""
    pipe, held, graphs = make(), layout(embeddings(1)), []
    expected = sample(pipe, layout=held, num_inference_steps=4)
    inner = torch._dynamo.lookup_backend(backend)

    def counted(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return inner(graph, example_inputs)

    pipe.unet = torch.compile(pipe.unet, backend=counted, fullgraph=True)
    try:
        for _ in range(2):
            assert_equal_up_to_rounding(sample(pipe, layout=held, num_inference_steps=4), expected, RUN)
        assert len(graphs) == 1
    finally:
        torch._dynamo.reset()
