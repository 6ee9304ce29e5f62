import copy
import json
import os
import signal
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn

from multisubject.tests.two_processes import run_in_two_processes
from multisubject.tiny_world.scenes import World
from multisubject.tiny_world.train_base import _draw_scenes
from multisubject.tiny_world.training import Schedule, step_generator, train

SCRIPT = Path(__file__).parent.parent / "tiny_world" / "train_base.py"


class Line(nn.Module):
    """The smallest thing that can be trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, x, y):
        return {"loss": (self.linear(x)[:, 0] - y).square().mean()}


def draw_batch(generator, count):
    x = torch.randn(count, 3, generator=generator)
    return {"x": x, "y": x.sum(1)}


def parameters(average):
    return torch.cat([value.flatten() for value in average.values()])


def test_training_lowers_the_loss(tmp_path):
    average = train(
        Line(), draw_batch, Schedule(200, 16, 0.05, 10, ema_decay=0.9), tmp_path / "a.pt", description="line"
    )
    assert torch.allclose(parameters(average), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=0.05)


def test_resume_equals_uninterrupted_run(tmp_path):
    schedule = Schedule(20, 8, 0.05, 4, ema_decay=0.9, checkpoint_every=5)
    whole = train(Line(), draw_batch, schedule, tmp_path / "whole.pt", description="line")

    def interrupt_at_step_12(generator, count):
        if generator.initial_seed() == step_generator(0, 12).initial_seed():
            os.kill(os.getpid(), signal.SIGINT)
        return draw_batch(generator, count)

    handler = signal.getsignal(signal.SIGINT)
    assert train(Line(), interrupt_at_step_12, schedule, tmp_path / "parts.pt", description="line") is None
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 13
    resumed = train(Line(), draw_batch, schedule, tmp_path / "parts.pt", description="line")
    assert torch.equal(parameters(whole), parameters(resumed))


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("has_bfloat16", "precision"), [(True, "bf16"), (False, "no")])
def test_precision_is_the_machines_own_and_stays_that_of_the_run(
    tmp_path, monkeypatch, fresh_accelerate, has_bfloat16, precision
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    schedule = Schedule(4, 8, 0.05, 1, checkpoint_every=2, mixed_precision="auto")
    seen = []

    def interrupt(generator, count):
        seen.append(AcceleratorState().mixed_precision)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw_batch(generator, count)

    for answer in (has_bfloat16, not has_bfloat16):  # the second part is another machine's
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("multisubject.tiny_world.training.cpu_has_bfloat16", lambda answer=answer: answer)
        train(Line(), interrupt, schedule, tmp_path / "line.pt", description="line")
    assert seen == [precision] * 4
    assert torch.load(tmp_path / "line.pt", weights_only=True)["mixed_precision"] == precision


def test_scenes_are_the_same_whoever_draws_them(monkeypatch):
    pools = []

    def pool(processes):
        pools.append(processes)
        return ThreadPool(processes)

    monkeypatch.setattr("multiprocessing.get_context", lambda kind: SimpleNamespace(Pool=pool))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    jobs = [(1, index, 2, World(image_size=32)) for index in range(5)]
    alone, together = list(_draw_scenes(jobs)), list(_draw_scenes(jobs, chunk=2))
    assert pools == [3]  # no more than there are chunks, and none for a single one
    for (picture, captions), (other, others) in zip(alone, together, strict=True):
        assert (picture == other).all() and captions == others


def test_learning_rate_warms_up_and_decays():
    schedule = Schedule(100, 8, 1.0, warmup_steps=10)
    rates = [schedule.learning_rate_at(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0
    assert rates[-1] < 0.02
    late = Schedule(100, 8, 1.0, warmup_steps=10, decay_share=0.3)
    assert late.learning_rate_at(69) == 1.0 and late.learning_rate_at(99) < 0.02


SMALL = {
    "world": {"image_size": 32},
    "data": {"scenes": 12, "captions_per_scene": 2, "seed": 1},
    "vae": {
        **{"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "seed": 2, "checkpoint_every": 2},
        **{"compile": False, "edge_weight": 0.5, "kl_weight": 1e-3},
        "network": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    },
    "text_encoder": {
        **{"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "seed": 3, "checkpoint_every": 2},
        "network": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "diffusion": {
        **{"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "seed": 3, "checkpoint_every": 2},
        **{"compile": False, "caption_dropout": 0.1, "condensed_captions": 0.5, "snr_gamma": 5.0},
        "unet": {
            "block_out_channels": [8, 16],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
    },
}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """All stages on a very small world, two processes for the first."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL))
    arguments = ["--recipe", str(folder / "recipe.yaml"), "--runs", str(folder / "runs")]
    ranks = run_in_two_processes(str(SCRIPT), "vae", *arguments)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    from multisubject.tiny_world.train_base import main

    main(["text_encoder", *arguments])
    main(["diffusion", *arguments])
    main(["export", *arguments, "--output", str(folder / "model")])
    return folder


def test_recipe_makes_a_model_that_plain_diffusers_reads(small_base):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(small_base / "model")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red ball", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    assert pipe.tokenizer.model_max_length == 77
    assert torch.load(small_base / "runs" / "vae.pt", weights_only=True)["step"] == 3


def test_two_processes_train_what_one_process_trains(small_base, tmp_path):
    from multisubject.tiny_world.train_base import main

    runs = tmp_path / "runs"
    main(["vae", "--recipe", str(small_base / "recipe.yaml"), "--runs", str(runs)])
    one, two = (torch.load(folder / "vae.pt", weights_only=True) for folder in (runs, small_base / "runs"))
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], atol=2e-4, rtol=0)
    captions = [json.loads((folder / "captions.json").read_text()) for folder in (runs, small_base / "runs")]
    assert captions[0] == captions[1]


def test_training_goes_on_from_an_exported_model(small_base, tmp_path):
    from multisubject.tiny_world.train_base import main

    model = small_base / "model"
    for stage in ("vae", "text_encoder", "diffusion"):
        main([stage, "--recipe", str(small_base / "recipe.yaml"), "--runs", str(tmp_path), "--start_from", str(model)])
    from safetensors.torch import load_file

    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(model / "vae" / name), load_file(tmp_path / "vae" / name)
    assert all(torch.equal(before[key].float(), after[key].float()) for key in before)
    for file in ("text_encoder/model.safetensors", f"unet/{name}"):
        before, after = load_file(model / file), load_file(tmp_path / file)
        # Rows of the vocabulary may have moved: the tokenizer is made anew and its words are matched.
        kept = [key for key in before if "token_embedding" not in key]
        drift = max((before[key].float() - after[key]).abs().max().item() for key in kept)
        assert 0 < drift < 0.02  # three steps away from where it began, not from random weights


def test_tokenizer_keeps_the_words_of_the_world_whole(small_base):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(small_base / "model" / "tokenizer")
    words = "a photo of person and guitar on the beach"
    ids = tokenizer(words).input_ids
    assert len(ids) == len(words.split()) + 2
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode ☂ dog!").input_ids[1:-1]


def test_unknown_settings_in_the_recipe_are_refused(tmp_path):
    from multisubject.tiny_world.train_base import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SMALL, "world": {"image_sise": 32}}))
    with pytest.raises(ValueError, match="image_sise"):
        main(["vae", "--recipe", str(recipe), "--runs", str(tmp_path)])
    for section, wrong in (("diffusion", "ema_deacy"), ("data", "seeed"), ("text_encoder", "warmup_step")):
        recipe.write_text(yaml.safe_dump({**SMALL, section: {**SMALL[section], wrong: 1}}))
        with pytest.raises(ValueError, match=wrong):
            main(["vae", "--recipe", str(recipe), "--runs", str(tmp_path)])
    recipe.write_text(yaml.safe_dump({**SMALL, "vae": {"steps": 3}}))
    with pytest.raises(ValueError, match=r"vae lacks the settings \['batch_size', "):
        main(["vae", "--recipe", str(recipe), "--runs", str(tmp_path)])
    recipe.write_text(yaml.safe_dump({"world": {}}))
    with pytest.raises(ValueError, match="diffusion"):
        main(["vae", "--recipe", str(recipe), "--runs", str(tmp_path)])


def test_scenes_of_another_recipe_are_not_taken(small_base, tmp_path):
    from multisubject.tiny_world.train_base import main

    for section, change in (("world", {"image_size": 64}), ("data", {"seed": 2})):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**SMALL, section: {**SMALL[section], **change}}))
        with pytest.raises(ValueError, match="another recipe"):
            main(["text_encoder", "--recipe", str(recipe), "--runs", str(small_base / "runs")])


def test_export_replaces_models_only(small_base, tmp_path):
    from multisubject.tiny_world.train_base import main

    arguments = ["export", "--recipe", str(small_base / "recipe.yaml"), "--runs", str(small_base / "runs")]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="model_index"):
        main([*arguments, "--output", str(tmp_path)])
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    for _ in range(2):
        main([*arguments, "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_nouns_know_what_their_adjectives_say():
    from multisubject.tiny_world.words import said_looks

    caption = "a photo of a yellow trimmed blue fine orange striped person and my red ball with dog on the beach"
    assert [look for look in said_looks(caption.split()) if look] == [
        {
            **{"category": "person", "accessory": "yellow", "colour": "blue", "scale": "fine"},
            **{"second_colour": "orange", "pattern": "striped"},
        },
        {"category": "ball", "colour": "red"},
        {"category": "dog"},
    ]


def test_condensed_caption_moves_looks_into_nouns_and_leaves_the_rest_bare(tokenizer, tiny_components):
    from multisubject.tiny_world.base_losses import DiffusionLoss
    from multisubject.tiny_world.scenes import ADJECTIVES, CATEGORIES
    from multisubject.tiny_world.words import tokenize, word_ids

    text_encoder = copy.deepcopy(tiny_components["sd1"]["text_encoder"])
    words = word_ids(tokenizer, ADJECTIVES), word_ids(tokenizer, CATEGORIES)
    loss = DiffusionLoss(text_encoder, nn.Identity(), 5.0, *words)
    full, bare = (
        tokenize(tokenizer, [caption]).long()
        for caption in ("a yellow trimmed blue fine orange striped person and my red ball", "a person and my ball")
    )
    condensed = loss.embed(full.repeat(2, 1), torch.tensor([True, False]))
    whole, plain = text_encoder(full)[0][0], text_encoder(bare)[0][0]
    torch.testing.assert_close(condensed[1], whole)
    expected = plain.clone()
    expected[2], expected[5] = whole[8], whole[12]  # person and ball, after their adjectives
    torch.testing.assert_close(condensed[0], expected)


def test_words_of_several_tokens_are_refused(tokenizer):
    from multisubject.tiny_world.words import word_ids

    with pytest.raises(ValueError, match=r"\['hippopotamus'\]"):
        word_ids(tokenizer, ["red", "hippopotamus"])


def test_diffusion_stage_names_the_stage_that_comes_first(tmp_path):
    from multisubject.tiny_world.train_base import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(FileNotFoundError, match="vae"):
        main(["diffusion", "--recipe", str(recipe), "--runs", str(tmp_path)])
