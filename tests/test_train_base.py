import copy
import json
import os
import signal
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from multisubject.tests.conftest import EMBED_DIM, assert_equal_up_to_rounding
from multisubject.tests.two_processes import run_in_two_processes
from multisubject.tiny_world.recipe import _draw_scenes, stratified
from multisubject.tiny_world.scenes import World
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


LOOP = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "seed": 2, "checkpoint_every": 2}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SMALL = {
    "world": {"image_size": 32},
    "data": {"scenes": 12, "captions_per_scene": 2, "seed": 1},
    "vae": {
        **LOOP,
        **{"edge_weight": 0.5, "kl_weight": 1e-3},
        "network": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    },
    "decoder": {
        **LOOP,
        **{"edge_weight": 0.5, "feature_weight": 0.1, "adversarial_weight": 0.1, "discriminator": {"channels": [8, 8]}},
    },
    "text_encoder": {**LOOP, "networks": {"text_encoder": ENCODER}},
    "diffusion": {
        **LOOP,
        **{"compile": False, "caption_dropout": 0.1, "condensed_captions": 0.5, "snr_gamma": 5.0, "unet": UNET},
    },
}
SMALL_XL = {
    "inherits": "recipe.yaml",
    "text_encoder": {
        **LOOP,
        "networks": {
            "text_encoder": {**ENCODER, "num_hidden_layers": 2},
            "text_encoder_2": {**ENCODER, "num_hidden_layers": 2, "hidden_size": 24, "projection_dim": 8},
        },
    },
    "diffusion": {**SMALL["diffusion"], "unet": {**UNET, "addition_time_embed_dim": 8}},
}


def run(stage, folder, *flags):
    from multisubject.tiny_world.train_base import main

    return main([stage, "--recipe", str(folder / "recipe.yaml"), "--runs", str(folder / "runs"), *map(str, flags)])


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """All stages on a very small world, two processes for the first."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL))
    arguments = ["--recipe", str(folder / "recipe.yaml"), "--runs", str(folder / "runs")]
    ranks = run_in_two_processes(str(SCRIPT), "vae", *arguments)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for stage in ("decoder", "text_encoder", "diffusion"):
        run(stage, folder)
    run("export", folder, "--output", folder / "model")
    return folder


@pytest.fixture(scope="module")
def small_xl_base(small_base):
    """A base of XL's kind made from the other one."""
    (small_base / "recipe_xl.yaml").write_text(yaml.safe_dump(SMALL_XL))
    flags = ["--recipe", small_base / "recipe_xl.yaml", "--runs", small_base / "runs_xl"]
    for stage in ("vae", "text_encoder", "diffusion"):
        run(stage, small_base, *flags, "--scenes", small_base / "runs", "--start_from", small_base / "model")
    run("export", small_base, *flags, "--output", small_base / "model_xl")
    return small_base / "model_xl"


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
        drift = max((before[key].float() - after[key]).abs().max().item() for key in before)
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
    recipe.write_text(yaml.safe_dump({**SMALL, "text_encoder": {**LOOP, "networks": {"encoder": ENCODER}}}))
    with pytest.raises(ValueError, match=r"networks \['encoder'\]; expected text_encoder, and text_encoder_2"):
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
    from multisubject.training.models import TextEncoders

    text_encoder = copy.deepcopy(tiny_components["sd1"]["text_encoder"])
    words = word_ids(tokenizer, ADJECTIVES), word_ids(tokenizer, CATEGORIES)
    loss = DiffusionLoss(TextEncoders({"text_encoder": text_encoder}), nn.Identity(), 5.0, *words)
    full, bare = (
        tokenize(tokenizer, [caption]).long()
        for caption in ("a yellow trimmed blue fine orange striped person and my red ball", "a person and my ball")
    )
    condensed, pooled = loss.embed(full.repeat(2, 1), torch.tensor([True, False]), torch.ones(2, 1, dtype=torch.bool))
    assert pooled is None
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
    with pytest.raises(FileNotFoundError, match="decoder"):
        (tmp_path / "text_encoder").mkdir()
        CLIPTextModel(CLIPTextConfig(vocab_size=9, **ENCODER)).save_pretrained(tmp_path / "text_encoder")
        main(["export", "--recipe", str(recipe), "--runs", str(tmp_path), "--output", str(tmp_path / "model")])


def test_decoder_stage_leaves_the_latents_as_they_are(small_base):
    from safetensors.torch import load_file

    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(small_base / "runs" / stage / name) for stage in ("vae", "decoder"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_discriminator_learns_and_the_decoder_follows_it():
    """One step has both gradients: the discriminator's tell drawn from decoded, the decoder's please it."""
    from diffusers import AutoencoderKL

    from multisubject.tiny_world.base_losses import DecoderLoss, PatchDiscriminator

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, mid_block_add_attention=False)
    batch = {"pixels": torch.randint(0, 256, (2, 3, 16, 16)).byte(), "noise": torch.randn(2, 4, 16, 16)}

    def gradients(adversarial_weight):
        discriminator = PatchDiscriminator([8, 8])
        discriminator.load_state_dict(weights)
        loss = DecoderLoss(vae, discriminator, 0.5, 0.1, adversarial_weight)
        vae.zero_grad()
        loss(**batch)["loss"].backward()
        return vae.decoder.conv_out.weight.grad.clone(), discriminator.head.weight.grad.clone()

    weights = PatchDiscriminator([8, 8]).state_dict()
    (alone, judged), (pleasing, judged_again) = gradients(0.0), gradients(0.5)
    torch.testing.assert_close(judged, judged_again)  # the decoder's wish does not move the discriminator
    assert judged.abs().max() > 0 and vae.encoder.conv_in.weight.grad is None
    # Half as strong as what it is added to.
    torch.testing.assert_close((pleasing - alone).norm() / alone.norm(), torch.tensor(0.5), atol=0.01, rtol=0)


def test_autoencoder_of_larger_pictures_learns_an_earlier_ones_latents(small_base, tmp_path):
    from diffusers import AutoencoderKL

    larger = {**SMALL, "world": {"image_size": 64}}
    larger["vae"] = {**larger["vae"], "steps": 30, "learning_rate": 3e-3, "ema_decay": 0.5}
    larger["vae"]["network"] = {**larger["vae"]["network"], "block_out_channels": [8, 8, 8]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(larger))
    earlier = AutoencoderKL.from_pretrained(small_base / "model" / "vae").float()
    run("vae", tmp_path, "--start_from", small_base / "model")
    found = AutoencoderKL.from_pretrained(tmp_path / "runs" / "vae")
    assert found.config.scaling_factor == earlier.config.scaling_factor and found.config.sample_size == 64
    pixels = torch.from_numpy(np.load(tmp_path / "runs" / "scenes.npy")).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        wanted = earlier.encode(nn.functional.interpolate(pixels, size=(32, 32), mode="area")).latent_dist.mean
        ours = found.encode(pixels).latent_dist.mean
    assert ours.shape == wanted.shape
    assert (ours - wanted).square().mean() < 0.6 * wanted.var()  # a random encoder is at 1 and more


def test_base_of_xl_is_made_from_the_other_one(small_base, small_xl_base):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(small_xl_base)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red ball", num_inference_steps=2).images[0]
    assert image.size == (32, 32) and pipe.config.force_zeros_for_empty_prompt
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.unet.config.cross_attention_dim == 16 + 24


def test_a_unet_moved_over_gives_the_same_pictures(small_base):
    """Whatever the second encoder, the pooled embedding and the sizes say."""
    from diffusers import UNet2DConditionModel

    from multisubject.tiny_world.recipe import Recipe
    from multisubject.tiny_world.train_base import Job, load_earlier_unet, make_text_encoders, make_unet
    from multisubject.tiny_world.words import make_tokenizer

    recipe = Recipe.load(small_base / "recipe.yaml")
    (small_base / "moved.yaml").write_text(yaml.safe_dump(SMALL_XL))
    recipe_xl = Recipe.load(small_base / "moved.yaml")
    assert recipe_xl.world == recipe.world and recipe_xl.is_xl and not recipe.is_xl
    tokenizer = make_tokenizer(small_base / "runs" / "tokenizer")
    encoders = make_text_encoders(Job(recipe_xl, small_base, small_base, None), tokenizer)
    old = UNet2DConditionModel.from_pretrained(small_base / "model" / "unet").float()
    new = make_unet(recipe_xl, encoders, 16)
    load_earlier_unet(new, small_base / "model")
    latents, embeds, times = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 40), torch.tensor([3, 700])
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.rand(2, 6) * 64}
    with torch.inference_mode():
        expected = old(latents, times, embeds[..., :16]).sample
        found = new(latents, times, embeds, added_cond_kwargs=added).sample
    assert_equal_up_to_rounding(found, expected)
    other = make_unet(Recipe.load(small_base / "moved.yaml"), encoders, 16)
    wider = UNet2DConditionModel.from_config({**other.config, "block_out_channels": [16, 16]})
    with pytest.raises(ValueError, match=r"expected a model of the same `diffusion\.unet`"):
        load_earlier_unet(wider, small_base / "model")


def test_each_of_two_encoders_sometimes_says_all(small_base):
    from multisubject.tiny_world.recipe import Recipe
    from multisubject.tiny_world.train_base import draw_conditions

    (small_base / "drawn.yaml").write_text(yaml.safe_dump(SMALL_XL))
    recipe = Recipe.load(small_base / "drawn.yaml")
    captioned = torch.arange(3000) >= 300
    drawn = draw_conditions(recipe, 2, captioned, step_generator(0, 0))
    kinds = drawn["carrying"][captioned].float() @ torch.tensor([1.0, 2.0])
    for kind in (1, 2, 3):
        assert (kinds == kind).float().mean() == pytest.approx(1 / 3, abs=0.04)
    zero = ~drawn["carrying"][~captioned]
    assert torch.equal(zero[:, 0], zero[:, 1]) and zero.float().mean() == pytest.approx(0.5, abs=0.1)
    assert not drawn["condensed"][~captioned].any()
    assert drawn["condensed"][captioned].float().mean() == pytest.approx(0.5, abs=0.04)
    sizes, crops, targets = drawn["time_ids"].split(2, dim=1)
    assert sizes.min() >= 8 and sizes.max() <= 128 and (targets == 32).all()
    assert crops.max() <= 32 and (crops == 0).all(dim=1).float().mean() == pytest.approx(0.5, abs=0.1)
    assert set(draw_conditions(recipe, 1, captioned, step_generator(0, 0))) == {"condensed", "carrying"}


def test_condensed_caption_of_two_encoders(tokenizer, tiny_components):
    """Where one encoder alone carries, the other's nouns are bare, or all of its columns zero; the pooled embedding
    never says more than the text does."""
    from multisubject.tiny_world.base_losses import DiffusionLoss
    from multisubject.tiny_world.scenes import ADJECTIVES, CATEGORIES
    from multisubject.tiny_world.words import tokenize, word_ids
    from multisubject.training.models import TextEncoders

    parts = tiny_components["xl"]
    encoders = TextEncoders({name: copy.deepcopy(parts[name]) for name in ("text_encoder", "text_encoder_2")})
    words = word_ids(tokenizer, ADJECTIVES), word_ids(tokenizer, CATEGORIES)
    loss = DiffusionLoss(encoders, nn.Identity(), 5.0, *words)
    full, bare = (
        tokenize(tokenizer, [caption]).long() for caption in ("a red striped person and a dog", "a person and a dog")
    )
    condensed = torch.tensor([True, True, False, False])
    carrying = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    embeds, pooled = loss.embed(full.repeat(4, 1), condensed, carrying)
    (whole, _), (plain, plain_pooled) = (encoders(ids[:, None].expand(-1, 2, -1)) for ids in (full, bare))
    first, second = slice(0, EMBED_DIM), slice(EMBED_DIM, None)
    torch.testing.assert_close(embeds[0, 2, first], whole[0, 4, first])
    torch.testing.assert_close(embeds[0, 2, second], plain[0, 2, second])
    torch.testing.assert_close(embeds[1, 2, first], plain[0, 2, first])
    torch.testing.assert_close(embeds[1, 2, second], whole[0, 4, second])
    torch.testing.assert_close(embeds[2, :, first], whole[0, :, first])
    assert not embeds[2, :, second].any() and not embeds[3].any() and not pooled[2:].any()
    torch.testing.assert_close(pooled[:2], plain_pooled.expand(2, -1))


def test_stratified_timesteps_cover_all_noise_levels():
    steps = stratified(1000, 20, step_generator(0, 0)).sort().values
    assert (steps // 50).tolist() == list(range(20))
