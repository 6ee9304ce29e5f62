import io
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from transformers import CLIPTextConfig, CLIPTextModel

from multisubject import generate_images
from multisubject.base_models import fingerprint_text_encoder
from multisubject.generate_images import main
from multisubject.generation import console, making, picture_files, prompts
from multisubject.generation.arguments import GenerateArguments
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import OPTIONS, ConfigError, read_config
from multisubject.generation.picture_files import CONTACT_SHEET, read_settings, save_picture
from multisubject.generation.tasks import load_tasks
from multisubject.hub_utils import save_subject
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.tests.two_processes import run_in_two_processes
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.training.run_lock import LOCK_FILE, locked

ROOT = Path(__file__).parent.parent
EMBED_DIM = json.loads((EMBEDDED_BASE / "text_encoder" / "config.json").read_text())["hidden_size"]
SUBJECTS = {"petrucci": "person", "majesty": "guitar", "biscuit": "dog", "sunrise": "mug", "comet": "ball"}
SEED_ENTRY: dict[str, Any] = {
    "prompt": "a photo of person and guitar on the beach",
    "residual_dict": {"person": "embeddings/petrucci.pt", "guitar": "embeddings/majesty.pt"},
    "color_context": {"255,0,0": ["person", 2.5], "0,0,255": ["guitar", 2.5]},
    "guidance_steps": 50,
    "guidance_weight": 0.08,
    "weight_negative": -1e8,
    "layout": "layouts/guitar.png",
    "subject_list": [["person", 4], ["guitar", 6]],
}


RED_DOG: dict[str, Any] = {
    "prompt": "a photo of a red dog",
    "residual_dict": {"dog": "embeddings/biscuit.pt", "red dog": "embeddings/biscuit.pt"},
    "color_context": None,
    "layout": None,
}


@pytest.fixture(scope="session")
def base():
    return BaseModel.read(str(EMBEDDED_BASE))


@pytest.fixture(scope="module")
def workshop(base, tmp_path_factory):
    """A user's folder: random subjects of the base's width in `embeddings`, the repository's `layouts`, smaller."""
    folder = tmp_path_factory.mktemp("workshop")
    generator = torch.Generator().manual_seed(0)
    for name, phrase in SUBJECTS.items():
        delta = 0.1 * torch.randn(1, EMBED_DIM, generator=generator)
        for suffix in ("pt", "safetensors"):
            subject = ResidualEmbedding(phrase, {"text_encoder": delta})
            save_subject(subject, folder / "embeddings" / f"{name}.{suffix}", name=name)
    (folder / "layouts").mkdir()
    for layout in (ROOT / "layouts").glob("*.png"):
        Image.open(layout).resize((64, 64), Image.Resampling.NEAREST).save(folder / "layouts" / layout.name)
    return folder


@pytest.fixture(autouse=True)
def in_workshop(workshop, monkeypatch):
    monkeypatch.chdir(workshop)


@pytest.fixture
def check(base, tmp_path):
    """Write entries as a config and check it: tasks and warnings."""

    def run(*entries, **kwargs):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(entries, indent=2), encoding="utf-8")
        return load_tasks(read_config(path), base, **kwargs)

    return run


def changed(**changes):
    """The seed's entry with some keys changed, or dropped where the value is None."""
    return {key: value for key, value in (SEED_ENTRY | changes).items() if value is not None}


# --- what entries mean ---------------------------------------------------------------------------------------------


def test_the_seed_entry_marks_its_subjects_and_goes_to_the_folder_of_the_seed(check):
    (task,), warnings = check(SEED_ENTRY)
    assert task.prompt == "a photo of <person> and <guitar> on the beach"
    assert task.folder == Path("guitar_person/a_photo_of_person_and_guitar_on_the_beach")
    assert [region.subject for region in task.regions()] == ["person", "guitar"]
    assert {name: subject.residual.class_phrase for name, subject in task.subjects.items()} == {
        "person": "person",
        "guitar": "guitar",
    }
    assert not warnings


@pytest.mark.parametrize("name", ["single", "two", "four"])
def test_shipped_configs_are_sound(name, base):
    (task,), warnings = load_tasks(read_config(ROOT / "configs" / f"guidance_conf_{name}.json"), base)
    assert len(task.subjects) == {"single": 1, "two": 2, "four": 4}[name]
    assert len(task.regions()) == {"single": 0, "two": 2, "four": 4}[name]
    assert not warnings


def test_guidance_steps_0_means_no_layout(check):
    (task,), _ = check(changed(guidance_steps=0))
    assert task.layout is None and task.regions() == ()


def test_a_layout_that_is_not_followed_is_not_read(check):
    (task,), _ = check(changed(guidance_steps=0, layout="not/there.png"))
    assert task.layout is None


def test_a_missing_file_of_a_subject_that_is_not_used_only_warns(check):
    residuals = SEED_ENTRY["residual_dict"] | {"shoes": "embeddings/airforce.pt"}
    (task,), (warning,) = check(changed(residual_dict=residuals))
    assert "shoes" in warning and "airforce.pt" in warning and set(task.subjects) == {"person", "guitar"}


def test_a_plain_word_may_stand_in_the_layout(check):
    entry = changed(
        residual_dict=None,
        subject_list=None,
        color_context=None,
        layout={"person": [0, 0, 0.5, 1], "beach": [0.5, 0, 1, 1]},
    )
    (task,), _ = check(entry)
    assert not task.subjects and task.folder.parts[0] == "beach_person"


def test_an_entry_with_neither_subjects_nor_layout_is_plain_text_to_image(check):
    (task,), _ = check({"prompt": "a photo of a dog"})
    assert task.folder == Path("no_subject/a_photo_of_a_dog") and task.prompt == "a photo of a dog"


def test_without_subject_list_every_word_of_residual_dict_is_a_subject(check):
    (task,), _ = check(changed(subject_list=None))
    assert task.prompt == "a photo of <person> and <guitar> on the beach"


def test_a_marked_subject_brings_its_own_class_phrase(check):
    residuals = {"rex": "embeddings/biscuit.safetensors", "dog": "embeddings/comet.pt"}
    (task,), _ = check({"prompt": "<rex> and a dog", "residual_dict": residuals, "layout": {"rex": [0, 0, 0.5, 1]}})
    assert task.prompt == "<rex> and a dog" and set(task.subjects) == {"rex"}
    assert task.subjects["rex"].residual.class_phrase == "dog"
    assert task.folder == Path("rex/rex_and_a_dog")


def test_the_index_chooses_between_equal_words(check):
    residuals = {"dog": "embeddings/biscuit.pt"}
    (task,), _ = check({"prompt": "a dog and a dog", "residual_dict": residuals, "subject_list": [["dog", 5]]})
    assert task.prompt == "a dog and a <dog>"


def test_the_index_may_count_words_or_tokens(check, base):
    prompt = "a photo of man and guitar"
    in_tokens = 1 + len(base.tokenizers["text_encoder"].tokenize("a photo of man and"))
    assert in_tokens != 6, "this test wants a word of several tokens before the subject"
    residuals = {"guitar": "embeddings/majesty.pt"}
    for index in (6, in_tokens):
        (task,), _ = check({"prompt": prompt, "residual_dict": residuals, "subject_list": [["guitar", index]]})
        assert task.prompt == "a photo of man and <guitar>"


def test_a_phrase_of_two_words_and_its_place_in_the_layout(check, base, workshop):
    save_subject(ResidualEmbedding("red dog", {"text_encoder": torch.ones(2, EMBED_DIM)}), workshop / "red.pt")
    entry = {"prompt": "red dog", "residual_dict": {"red dog": "red.pt"}, "layout": {"red dog": [0, 0, 1, 1]}}
    (task,), _ = check(entry)
    assert task.prompt == "<red-dog>" and task.regions()[0].subject == "red-dog"
    assert task.folder == Path("red_dog/red_dog")


def test_a_marked_key_of_two_words_is_its_class_phrase(check, base, workshop):
    save_subject(ResidualEmbedding("any", {"text_encoder": torch.ones(2, EMBED_DIM)}), workshop / "red.pt")
    entry = {"prompt": "a big <red dog> in snow", "residual_dict": {"red dog": "red.pt"}}
    (task,), _ = check(entry | {"layout": {"big <Red Dog>": [0, 0, 1, 1]}})
    assert task.prompt == "a big <red-dog> in snow"
    assert task.subjects["red-dog"].residual.class_phrase == "red dog"
    assert task.regions()[0].subject == "big <red-dog>"
    (task,), _ = check(entry | {"layout": {"<Red Dog>": [0, 0, 1, 1]}})
    assert task.regions()[0].subject == "red-dog"


def test_a_layout_may_be_a_json_file_with_mask_files(check, workshop):
    mask = Image.new("L", (32, 32))
    ImageDraw.Draw(mask).rectangle([0, 0, 15, 31], fill=255)
    mask.save(workshop / "left.png")
    (workshop / "layout.json").write_text(
        json.dumps(
            [{"subject": "person", "mask": "left.png"}, {"subject": "guitar", "box": [0.5, 0, 1, 1], "weight": 3}]
        )
    )
    (task,), _ = check(changed(layout="layout.json", color_context=None), size=(64, 64))
    person, guitar = task.regions()
    assert person.mask[:, :32].min() == 1 and person.mask[:, 33:].max() == 0 and guitar.weight == 3


def test_paths_are_tried_in_the_working_folder_then_beside_the_config_then_above_it(base, tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (elsewhere, project / "configs", project):
        monkeypatch.chdir(elsewhere if elsewhere.exists() else tmp_path)
        folder.mkdir(parents=True, exist_ok=True)
    path = project / "configs" / "config.json"
    path.write_text(json.dumps([{"prompt": "dog", "residual_dict": {"dog": "dog.pt"}}]))
    monkeypatch.chdir(elsewhere)
    for folder in (project, project / "configs", elsewhere):  # each goes before the ones that are there already
        save_subject(ResidualEmbedding("dog", {"text_encoder": torch.ones(1, EMBED_DIM)}), folder / "dog.pt")
        (task,), _ = load_tasks(read_config(path), base)
        assert Path(task.subjects["dog"].source).parent == folder


def test_a_hub_id_is_passed_on(check, base, monkeypatch):
    asked = []

    def load_subject(source, *, name, class_phrase):
        asked.append(source)
        return {name: ResidualEmbedding(class_phrase, {"text_encoder": torch.ones(1, EMBED_DIM)})}

    monkeypatch.setattr(prompts, "load_subject", load_subject)
    check({"prompt": "a dog", "residual_dict": {"dog": "user/biscuit@main"}})
    assert asked == ["user/biscuit@main"]


def test_equal_entries_have_folders_of_their_own(check):
    tasks, _ = check(SEED_ENTRY, changed(guidance_steps=10), {"prompt": "a dog"})
    assert [task.folder.name[-5:] for task in tasks] == ["beach", "ach_2", "a_dog"]
    tasks, _ = check(*({"prompt": prompt} for prompt in ("red ball", "red ball", "red ball 2", "Red Ball")))
    assert [task.folder.name for task in tasks] == ["red_ball", "red_ball_3", "red_ball_2", "Red_Ball_4"]


def test_folder_names_are_safe_and_short(check):
    (task, other), _ = check({"prompt": "../" + "é" * 300}, {"prompt": "../" + "é" * 301})
    assert len(task.folder.name.encode()) < 255 and ".." not in task.folder.parts
    assert task.folder != other.folder


@pytest.mark.parametrize("name", ["CON", "prn", "Aux", "nul", "COM1", "lpt9", "COM¹", "con.txt", "NUL. .", " aux..."])
def test_a_prompt_that_windows_keeps_for_a_device_has_a_folder_of_another_name(name, check):
    (task,), _ = check({"prompt": name})
    assert task.folder.name == "_" + name.strip(" .")
    (task,), _ = check({"prompt": name, "layout": {name.strip(" ."): [0, 0, 1, 1]}})
    assert {part[0] for part in task.folder.parts} == {"_"}, "the subjects' folder"


def test_folders_of_prompts_that_only_begin_like_a_device_keep_their_names(check):
    prompts = ("con artist", "CONE", "com", "com10", "aux-in", "_con_a", "a CON.")
    tasks, _ = check(*({"prompt": prompt} for prompt in prompts))
    assert [task.folder.name for task in tasks] == ["con_artist", "CONE", "com", "com10", "aux-in", "con_a", "a_CON"]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_one_report_names_every_problem_with_its_place(base, workshop, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        """[
  {
    "prompt": "a photo of person and guitar",
    "residual_dict": {
      "person": "embeddings/nobody.pt",
      "guitar": "embeddings/majesty.pt"
    },
    "color_context": {"255,0,0": ["person", 2.5], "0,255,0": ["guitar", 2.5]},
    "layout": "layouts/guitar.png",
    "guidance_wieght": 0.1,
    "guidance_steps": -1,
    "subject_list": [["person", 4], ["guitar", 5]]
  },
  {
    "layout": "layouts/nothing.png"
  }
]""",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as error:
        load_tasks(read_config(path), base)
    report = str(error.value)
    assert report.startswith("6 problems")
    for line, text in {
        10: "entry 1, guidance_wieght: unknown key; did you mean 'guidance_weight'?",
        11: "entry 1, guidance_steps: expected a whole number from 0",
        12: 'entry 1, subject_list: ["guitar", 5]: 5 is not its place in the prompt; expected 6',
        5: "entry 1, residual_dict['person']: 'embeddings/nobody.pt' does not exist; looked in",
        9: "entry 1, layout: layout and color_context disagree: color_context['0,255,0'] is not in the colour map",
        14: "entry 2: expected a `prompt`",
    }.items():
        assert f"config.json:{line}: {text}" in report
    assert "'0,0,255'" in report  # the map's colour that is not listed
    assert str(workshop) in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "expected text"),
        ({"prompt": 3}, "expected text, got 3"),
        ({"residual_dict": ["person"]}, "expected a dictionary"),
        ({"subject_list": [["person"]]}, "list of \\[subject, index from 1\\]"),
        ({"subject_list": [["person", 0]]}, "list of \\[subject, index from 1\\]"),
        ({"subject_list": [["person", True]]}, "list of \\[subject, index from 1\\]"),
        ({"guidance_steps": 2.5}, "whole number from 0"),
        ({"guidance_weight": float("nan")}, "expected a number"),
        ({"weight_negative": 1.0}, "at most 0"),
        ({"recurrence": 0}, "whole number from 1"),
        ({"recurrence_steps": -1}, "whole number from 0"),
        ({"moves": 0.3}, r"moves: expected shares of the steps, from 0 to less than 1, such as .*, got 0.3"),
        ({"moves": [True]}, "expected shares of the steps"),
        ({"moves": [1]}, "expected shares of the steps"),
        ({"seed": -1}, "whole number from 0"),
        ({"seed": 2**63}, "whole number from 0"),
        ({"guidance_weight": 1e300}, "expected a number"),
        ({"guidance_weight": 10**400}, "expected a number"),
        ({"color_context": None, "layout": {"person": [0, 0, 1, 10**400]}}, "expected"),
        ({"residual_dict": {"person": "~nobody-here/x.pt", "guitar": "embeddings/majesty.pt"}}, "home directory"),
        (
            {
                "subject_list": [["person", 3], ["guitar", 6]],
                "residual_dict": {"person": "embeddings/nope.pt", "guitar": "embeddings/majesty.pt"},
            },
            "not its place.*nope.pt.*does not exist",
        ),
        ({"negative_prompt": 1}, "expected text"),
        ({"guidance_method": "magic"}, "magic.*cones2"),
        ({"layout": []}, "colour map's path"),
        ({"layout": None}, "colours without a `layout`"),
        ({"color_context": {"255,0": ["person", 2.5], "0,0,255": ["guitar", 2.5]}}, "255,0.*expected a colour"),
        ({"color_context": {"255,0,0": ["cat", 2.5], "0,0,255": ["guitar", 2.5]}}, "'cat' is not in the prompt"),
        ({"color_context": None, "layout": {"person": [0, 0, 2, 2]}}, "from 0 to 1"),
        ({"subject_list": [["cat", 4]]}, "'cat' has no file in residual_dict"),
        ({"subject_list": [["person", 4], ["person", 4]]}, "the same word as another pair"),
        (RED_DOG | {"subject_list": [["dog", 6], ["red dog", 5]]}, "pair 2 names the same word as another pair"),
        (
            RED_DOG | {"prompt": "a photo of a <red dog>", "subject_list": [["dog", 6]]},
            "'dog' is a part of '<red dog>', which the prompt marks",
        ),
        (
            {"prompt": "a guitar", "subject_list": [["person", 1]]},
            "'person' is not in the prompt, whose words are 1 'a'",
        ),
        ({"prompt": "dog " * 90 + "person", "subject_list": [["person", 91]]}, "cut off"),
        ({"prompt": "person <nobody>"}, "'<nobody>' has no file in residual_dict.*leave the brackets out"),
        ({"prompt": "<persona> and guitar", "subject_list": None}, r"did you mean '<person>'\?"),
        (
            {
                "prompt": "a photo of petrucci",
                "residual_dict": {"petrucci": "embeddings/petrucci.safetensors"},
                "subject_list": None,
                "color_context": None,
                "layout": None,
            },
            "trained as 'person': write `<petrucci>`",
        ),
        (
            {
                "prompt": "a photo of <petrucci>",
                "residual_dict": {"petrucci": "embeddings/petrucci.pt"},
                "subject_list": None,
                "color_context": None,
                "layout": None,
            },
            "does not say which words it was trained with.*multisubject convert",
        ),
        ({"negative_prompt": "<majesty>"}, "entry 1, negative_prompt: the negative prompt '<majesty>' names.*<person>"),
        (
            {
                "prompt": "a Person and a person",
                "residual_dict": {"Person": "embeddings/petrucci.pt", "person": "embeddings/petrucci.pt"},
                "subject_list": None,
                "color_context": None,
                "layout": None,
            },
            "'Person' and 'person' mean the same name",
        ),
    ],
)
def test_what_cannot_run_is_refused(changes, message, check):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        check(changed(**changes))


def test_an_index_that_means_two_places_is_refused(check, tokenizer):
    # After a word of three tokens, the first dog is token 4 and the second one word 4.
    long_word = next(word for word in ("sun", "man", "box", "wig", "zip") if len(tokenizer.tokenize(word)) == 3)
    entry = {
        "prompt": f"{long_word} dog and dog",
        "residual_dict": {"dog": "embeddings/biscuit.pt"},
        "subject_list": [["dog", 4]],
    }
    with pytest.raises(ConfigError, match="means two places, one in words and one in tokens"):
        check(entry)


def test_a_plain_word_that_stands_twice_is_ambiguous_without_subject_list(check):
    with pytest.raises(ConfigError, match=r"stands 2 times in the prompt.*<dog>"):
        check({"prompt": "a dog and a dog", "residual_dict": {"dog": "embeddings/biscuit.pt"}})


def test_a_subject_of_another_base_is_refused(check, base, workshop):
    wide = ResidualEmbedding("dog", {"text_encoder": torch.ones(1, EMBED_DIM + 1)})
    save_subject(wide, workshop / "wide.pt")
    with pytest.raises(ConfigError, match=f"width {EMBED_DIM}"):
        check({"prompt": "a dog", "residual_dict": {"dog": "wide.pt"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a dog",}]', r"config.json:1: this is not JSON"),
        ('{"prompt": "a dog"}', "expected a list of entries"),
        ("[]", "expected a list of entries"),
        ("[1]", "entry 1: expected a dictionary"),
        ("[" * 100_000, "cannot be read"),
        ("[" + "1" * 5001 + "]", "cannot be read"),
        ('[{"prompt": "a dog", "prompt": "a mug"}]', "'prompt' stands twice"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, message, base, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tasks(read_config(tmp_path / "config.json"), base)


def test_what_is_wrong_in_the_file_itself_is_told_before_anything_heavy_is_imported(tmp_path):
    """In a fresh process, as users meet it."""
    configs = {
        "json": '[{"prompt": "a dog",}]',
        "list": "{}",
        "key": '[{"promt": "a dog"}]',
        "value": '[{"prompt": "a dog", "seed": -1, "layout": "layouts/nothing.png"}]',
    }
    for name, text in configs.items():
        (tmp_path / f"{name}.json").write_text(text)
    code = """
import json, sys
from multisubject import evaluate, generate_images

said = []
for name, main, *flags in json.loads(sys.argv[1]):
    try:
        {"generate": generate_images, "evaluate": evaluate}[main].main(flags)
    except SystemExit as end:
        heavy = sorted({"torch", "diffusers", "accelerate", "peft"} & sys.modules.keys())
        said.append([name, end.code, heavy])
json.dump(said, open("said.json", "w"))
"""
    runs = [[name, "generate", "--generation_config", str(tmp_path / f"{name}.json")] for name in [*configs, "no file"]]
    runs += [["flag", "generate", "--generation_config", "x.json", "--seed", "-1"]]
    runs += [["help", command, "--help"] for command in ("generate", "evaluate")]
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(runs)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = [[name, 0 if name == "help" else 2, []] for name, *_ in runs]
    assert json.loads((tmp_path / "said.json").read_text()) == expected
    for text in ("json.json:1: this is not JSON", "list.json:1: expected a list", "did you mean 'prompt'?"):
        assert text in result.stderr
    assert "entry 1, seed: expected a whole number from 0" in result.stderr
    assert "nothing.png" not in result.stderr and "is looked at when these are right" in result.stderr


def test_a_forgotten_dollar_is_pointed_out(monkeypatch, capsys):
    monkeypatch.setenv("CONFIG_DIR", "configs/mine.json")
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", "CONFIG_DIR", "--device", "cpu"])
    assert exit_info.value.code == 2
    assert "Did you mean $CONFIG_DIR, which is 'configs/mine.json'?" in capsys.readouterr().err


def test_a_forgotten_dollar_needs_no_network_to_be_pointed_out(config_file, tmp_path, monkeypatch, capsys, loaded):
    monkeypatch.setenv("MODEL_NAME", "somebody/model")
    flags = ["--generation_config", str(config_file), "--pretrained_model_name", "MODEL_NAME", *QUICK]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(BaseModel, "read", None)
        main(flags)
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "'MODEL_NAME' cannot be used: there is no such folder" in said
    assert "Did you mean $MODEL_NAME, which is 'somebody/model'?" in said
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED_BASE, "MODEL_NAME")  # a folder may be called like that
    Path("mine.json").write_text('[{"prompt": "a mug"}]')
    main(["--generation_config", "mine.json", *flags[2:], "--num_images", "1", "--num_inference_steps", "1"])


def test_a_base_that_is_none_is_refused(workshop, config_file, capsys):
    with pytest.raises(SystemExit):
        main(["--generation_config", str(config_file), "--pretrained_model_name", str(workshop), "--device", "cpu"])
    assert "has no unet/config.json; expected the folder or Hub id" in capsys.readouterr().err


def test_a_base_with_a_setting_or_weights_missing_is_refused(config_file, tmp_path, capsys):
    model = Path(shutil.copytree(EMBEDDED_BASE, tmp_path / "model"))
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "out"), *QUICK]
    for weights in (model / "unet").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(SystemExit, match=r"error: .*diffusion_pytorch_model"):
        main([*flags, "--pretrained_model_name", str(model)])
    config = model / "text_encoder" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "hidden_size"}))
    with pytest.raises(SystemExit):
        main([*flags, "--pretrained_model_name", str(model)])
    assert "'hidden_size' is missing in its" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "100"], "multiples of 8"),
        (["--resolution", "64x"], "multiples of 8"),
        (["--resolution", "512x4104"], "up to 4096"),
        (["--resolution", "16384"], "up to 4096"),
        (["--resolution", "9" * 5000], "up to 4096"),
        (["--num_images", "0"], "at least 1"),
        (["--seed", "-1"], "expected 0 to"),
        (["--seed", str(2**63)], "expected 0 to"),
        (["--guidance_scale", "nan"], "0 or more"),
        (["--device", "gpu"], "expected cpu or what this machine has"),
        *[(["--device", "cuda"], "expected cpu or what this machine has")] * (not torch.cuda.is_available()),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", "x.json", *flags])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in said
    assert said.startswith("error: ") and said.endswith("\nSee multisubject-generate --help.\n")


def test_what_no_picture_could_come_of_is_refused_before_the_model_loads(config_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("here first")
    monkeypatch.setattr(making, "load_pipeline", None)
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", str(config_file), "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2 and "cannot write to" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", str(config_file), "--output_dir", str(tmp_path), "--negative_prompt", "<rex>"])
    assert exit_info.value.code == 2 and "the negative prompt '<rex>' names a subject that" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "here first"


# --- pictures ------------------------------------------------------------------------------------------------------

FOLDER = Path("guitar_person/a_photo_of_person_and_guitar_on_the_beach")
QUICK = ["--num_inference_steps", "2", "--num_images", "2", "--device", "cpu"]


def settings_of(path):
    settings = read_settings(path)
    assert settings is not None, f"{path} has no settings"
    return settings


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def config_file(workshop):
    """Two entries: the seed's, and one without subjects and with a seed of its own."""
    path = workshop / "config.json"
    entries = [SEED_ENTRY, {"prompt": "a photo of a dog", "seed": 7, "negative_prompt": "a mug"}]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def gallery(workshop, config_file):
    """What one run leaves."""
    output_dir = workshop / "results"
    flags = ["--generation_config", str(config_file), "--output_dir", str(output_dir), "--save_attention_maps", *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)  # module fixtures come before `in_workshop`, and the repository has embeddings of its own
        main(flags)
    return output_dir


@pytest.fixture(scope="module")
def shared_pipe():
    return making.load_pipeline(
        BaseModel.read(str(EMBEDDED_BASE)), torch.device("cpu"), torch.float32, show_progress=False
    )


@pytest.fixture
def pipe(shared_pipe):
    """The embedded base's, loaded once, without subjects."""
    for name in shared_pipe.get_list_subjects():
        shared_pipe.unload_subject(name)
    return shared_pipe


@pytest.fixture
def loaded(pipe, monkeypatch):
    """For runs where loading is not the point."""
    monkeypatch.setattr(making, "load_pipeline", lambda *_, **__: pipe)


def test_every_entry_has_its_pictures_and_a_contact_sheet(gallery):
    for folder in (gallery / FOLDER, gallery / "no_subject" / "a_photo_of_a_dog"):
        assert {"0000.png", "0001.png", CONTACT_SHEET} <= {path.name for path in folder.iterdir()}
    assert (gallery / FOLDER / "0001_attention.png").exists()
    assert not list(gallery.rglob("*dog*/*attention*"))  # no subject: nothing to map


def test_pictures_say_how_they_were_made(gallery):
    settings = settings_of(gallery / FOLDER / "0001.png")
    assert settings["prompt"] == "a photo of <person> and <guitar> on the beach"
    assert settings["seed"] == 1 and settings["num_inference_steps"] == 2 and settings["guidance_weight"] == 0.08
    assert settings["guidance_method"] and settings["recurrence"] == 1  # also what the entry leaves to the pipeline
    assert settings["subjects"]["person"]["source"] == "embeddings/petrucci.pt"
    plain = settings_of(gallery / "no_subject" / "a_photo_of_a_dog" / "0001.png")
    assert plain["seed"] == 8 and plain["negative_prompt"] == "a mug" and "guidance_method" not in plain


def test_a_picture_is_what_the_pipeline_makes_of_the_seed(gallery, pipe):
    for word, file in SEED_ENTRY["residual_dict"].items():
        pipe.load_subject(file, name=word, class_phrase=word)
    image = pipe(
        SEED_ENTRY["prompt"],
        num_inference_steps=2,
        layout=SEED_ENTRY["layout"],
        color_context=SEED_ENTRY["color_context"],
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert np.array_equal(np.asarray(image), pixels(gallery / FOLDER / "0001.png"))


def test_a_seed_means_the_same_noise_in_every_precision(config_file, tmp_path, monkeypatch):
    """It is given to the pipeline, which would draw it in the model's precision: other noise, before torch 2.13."""
    from diffusers import StableDiffusionPipeline

    given = []

    def prepare(self, batch, channels, height, width, dtype, device, generator, latents=None):
        given.append(latents)
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", prepare)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(SystemExit):
            main(["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK, "--dtype", dtype])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(given[0], noise)
    assert torch.equal(given[1], noise.bfloat16())


def test_resume_makes_only_what_is_missing_damaged_or_other(gallery, config_file, tmp_path, capsys, loaded):
    folder = shutil.copytree(gallery, tmp_path / "results") / FOLDER
    data = (folder / "0001.png").read_bytes()
    (folder / "0001.png").write_bytes(data[: len(data) // 2])
    kept = (folder / "0000.png").stat().st_mtime_ns
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "results"), *QUICK, "--resume"]
    main(flags)
    assert "3 of 4 pictures are there already" in capsys.readouterr().out
    assert (folder / "0000.png").stat().st_mtime_ns == kept
    assert np.array_equal(pixels(folder / "0001.png"), pixels(gallery / FOLDER / "0001.png"))
    main([*flags, "--guidance_scale", "3", "--num_images", "1"])
    said = capsys.readouterr().out
    assert "0 of 2 pictures are there already. To be made again, as their settings differ (guidance_scale): 2." in said
    assert settings_of(folder / "0000.png")["guidance_scale"] == 3


def test_pictures_of_another_base_are_not_replaced(gallery, config_file, tmp_path, capsys):
    folder = shutil.copytree(gallery, tmp_path / "results") / FOLDER
    path = folder / "0000.png"
    save_picture(Image.open(path), path, settings_of(path) | {"model": "another/base"})
    before = path.read_bytes()
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "results"), *QUICK]
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stopped:
            main([*flags, *more])
        assert stopped.value.code == 2
        assert "0000.png is a picture of the base 'another/base', which one of " in capsys.readouterr().err
    assert path.read_bytes() == before


WRITER = """
import os, signal, sys
from multisubject import subject_file

def stop(_):
    print("half written", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()

subject_file.os.fsync = stop
subject_file.write_atomically(subject_file.Path(sys.argv[1]), b"whole")
"""


def test_a_run_clears_what_killed_runs_left_half_written_and_not_what_living_ones_write(gallery, config_file, tmp_path):
    folder = shutil.copytree(gallery, tmp_path / "results") / FOLDER
    there = set(folder.iterdir())

    def write(name, fate):
        command = [sys.executable, "-c", WRITER, str(folder / name), fate]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "half written\n"
        return writer

    with write("killed.png", "killed"):
        pass  # waits for its end
    with write("living.png", "living") as living:
        of_other_machines = [folder / f".0000.png.00000000-1-{digit * 8}" for digit in "ab"]
        for file in of_other_machines:
            file.touch()
        os.utime(of_other_machines[1], (0, 0))
        assert len(set(folder.iterdir()) - there) == 4
        flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "results"), *QUICK]
        main([*flags, "--resume"])
        half_written = set(folder.iterdir()) - there
        assert {file.name[: file.name.index("png")] for file in half_written} == {".living.", ".0000."}
        assert of_other_machines[0] in half_written
        living.communicate("")
    assert (folder / "living.png").read_bytes() == b"whole"


RUN = """
import sys
from multisubject.generate_images import main
from multisubject.generation import making

def stay(*_, **__):
    print("in", flush=True)
    sys.stdin.read()

making.load_pipeline = stay
main(sys.argv[1:])
"""


def test_a_folder_of_pictures_has_one_run_at_a_time(config_file, tmp_path, capsys, monkeypatch, loaded):
    (tmp_path / "other.json").write_text('[{"prompt": "a photo of a mug"}, {"prompt": "a photo of a ball"}]')
    flags = ["--output_dir", str(tmp_path / "out"), *QUICK, "--num_inference_steps", "1"]
    main([*flags, "--generation_config", str(config_file)])
    pictures = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    command = [sys.executable, "-c", RUN, *flags, "--generation_config", str(config_file)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as running:
        assert running.stdout.readline() == "in\n"
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
            patch.setattr(making, "load_pipeline", None)
            main([*flags, "--generation_config", str(config_file), "--guidance_scale", "3"])
        said = f"{tmp_path / 'out' / FOLDER}: another run is writing here (process {running.pid}); wait for its end"
        assert exit_info.value.code == 2 and said in capsys.readouterr().err
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == pictures
        main([*flags, "--generation_config", str(tmp_path / "other.json")])  # other folders of the same output_dir
        running.kill()
        assert "torchvision" not in running.stderr.read()
    main([*flags, "--generation_config", str(config_file), "--resume"])
    assert "4 of 4 pictures are there already" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob(LOCK_FILE))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_run_may_have_more_folders_than_open_files_are_usual(config_file, tmp_path, monkeypatch):
    import resource

    asked = []
    for limits, expected in [((256, 4096), 556), ((256, 512), 512), ((256, resource.RLIM_INFINITY), 556)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
        picture_files._allow_open_files(300)
        assert asked.pop() == (expected, limits[1])
        picture_files._allow_open_files(0)
        assert not asked


@pytest.mark.parametrize("name", ["0001.png", "0001_attention.png", CONTACT_SHEET])
def test_a_folder_in_the_way_of_a_picture_is_named_before_the_model_loads(
    name, config_file, tmp_path, capsys, monkeypatch
):
    in_the_way = tmp_path / FOLDER / name
    in_the_way.mkdir(parents=True)
    monkeypatch.setattr(making, "load_pipeline", None)
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK])
    assert exit_info.value.code == 2 and f"{in_the_way} is a folder, where a picture" in capsys.readouterr().err


def test_resume_makes_anew_what_another_model_made(tmp_path, capsys, loaded):
    model = Path(shutil.copytree(EMBEDDED_BASE, tmp_path / "model"))
    (tmp_path / "config.json").write_text(json.dumps([{"prompt": "a dog"}, {"prompt": "a mug"}]))
    flags = ["--generation_config", str(tmp_path / "config.json"), "--output_dir", str(tmp_path / "results"), *QUICK]
    flags += ["--pretrained_model_name", str(model), "--num_images", "1", "--num_inference_steps", "1", "--resume"]
    main(flags)
    main(flags)
    main([*flags, "--output_dir", str(model / "results")])  # nor do pictures beside the model change it
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "DDPMScheduler"))
    main(flags)
    said = [line for line in capsys.readouterr().out.splitlines() if " pictures are there already." in line]
    assert [line[0] for line in said] == ["0", "2", "0", "0"]
    assert ["To be made again" in line for line in said] == [False, False, False, True]
    assert said[3].endswith("(model_version): 2.")


def test_a_new_picture_takes_the_old_ones_attention_sheet_away(gallery, config_file, tmp_path, loaded):
    folder = shutil.copytree(gallery, tmp_path / "results") / FOLDER
    main(
        [
            "--generation_config",
            str(config_file),
            "--output_dir",
            str(tmp_path / "results"),
            *QUICK,
            "--seed",
            "5",
            "--num_inference_steps",
            "1",
        ]
    )
    assert settings_of(folder / "0000.png")["seed"] == 5
    assert not list(folder.glob("*_attention.png"))


def test_resume_makes_a_missing_attention_sheet(gallery, config_file, tmp_path, capsys, loaded):
    folder = shutil.copytree(gallery, tmp_path / "results") / FOLDER
    (folder / "0001_attention.png").unlink()
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "results"), *QUICK, "--resume"]
    main([*flags, "--save_attention_maps"])
    assert "3 of 4 pictures are there already" in capsys.readouterr().out
    assert (folder / "0001_attention.png").exists()


def test_an_entry_without_subjects_is_drawn_without_those_of_the_entry_before(gallery, pipe):
    for index in range(2):  # the entry has a seed of its own, 7
        image = pipe(
            "a photo of a dog",
            negative_prompt="a mug",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(7 + index),
        ).images[0]
        assert np.array_equal(
            np.asarray(image), pixels(gallery / "no_subject" / "a_photo_of_a_dog" / f"000{index}.png")
        )


def test_subjects_of_the_entry_before_are_gone(check, pipe):
    tasks, _ = check(SEED_ENTRY, {"prompt": "a dog", "residual_dict": {"dog": "embeddings/biscuit.pt"}})
    for task in tasks:
        making.load_subjects(pipe, task)
        assert sorted(pipe.get_list_subjects()) == sorted(task.subjects)


def test_a_subject_of_another_base_of_the_same_width_is_found_before_the_first_picture(base, tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fingerprint = fingerprint_text_encoder(CLIPTextModel(CLIPTextConfig(vocab_size=9, **size)))
    delta = {"text_encoder": torch.ones(1, EMBED_DIM)}
    stranger = ResidualEmbedding("dog", delta, {"text_encoder_fingerprint": fingerprint})
    save_subject(stranger, tmp_path / "rex.safetensors")
    entries = [{"prompt": "a mug"}, {"prompt": "a <rex>", "residual_dict": {"rex": str(tmp_path / "rex.safetensors")}}]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match="rex"):
        main(["--generation_config", str(tmp_path / "config.json"), "--output_dir", str(tmp_path / "out"), *QUICK])
    assert not list((tmp_path / "out").rglob("*.png"))


def test_ctrl_c_says_how_to_go_on(config_file, tmp_path, capsys, monkeypatch, loaded):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "make_picture", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK])
    assert exit_info.value.code == 130 and "with --resume goes on" in capsys.readouterr().err


def test_what_the_scheduler_refuses_is_no_traceback(config_file, tmp_path, loaded):
    model = Path(shutil.copytree(EMBEDDED_BASE, tmp_path / "model"))
    scheduler = model / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    del settings["num_train_timesteps"]  # or it would be known before
    scheduler.write_text(json.dumps(settings))
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK]
    with pytest.raises(SystemExit, match=r"error: .*num_inference_steps.*2000"):
        main([*flags, "--pretrained_model_name", str(model), "--num_inference_steps", "2000"])


def test_more_steps_than_the_base_has_levels_of_noise_are_refused_before_the_model_loads(
    config_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(making, "load_pipeline", None)
    with pytest.raises(SystemExit) as exit_info:
        flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "out")]
        main([*flags, "--num_inference_steps", "1001"])
    assert exit_info.value.code == 2
    assert "--num_inference_steps is 1001; expected at most 1000, the levels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_late_moves_are_refused_and_a_short_run_moves_nothing_and_says_so(check):
    check(changed(moves=[0.3]), changed(moves=[], seed=2), num_steps=10)
    check(changed(moves=[0.99], guidance_steps=0), num_steps=10)  # the layout is not followed
    with pytest.raises(ConfigError, match=r":\d+: entry 1, moves: .*0.99 is during the last of 10 steps"):
        check(changed(moves=[0.3, 0.99]), num_steps=10)
    (task,), warnings = check(changed(moves=[0.3]), num_steps=3)
    assert task.config.moves == []  # which the pipeline takes, whatever the number of steps
    assert [warning.partition("entry 1, ")[2] for warning in warnings] == [
        "moves: nothing is moved in 3 steps, that takes at least 10."
    ]
    assert check(changed(moves=[]), num_steps=3)[1] == []


def test_a_log_has_a_line_for_each_picture_and_nothing_that_moves_a_cursor(config_file, tmp_path, capsys):
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK]
    main([*flags, "--num_images", "1", "--num_inference_steps", "1"])
    pictures = [tmp_path / FOLDER / "0000.png", tmp_path / "no_subject" / "a_photo_of_a_dog" / "0000.png"]
    assert capsys.readouterr().err == f"1/2 {pictures[0]}\n2/2 {pictures[1]}\n"


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_precision_that_the_processor_imitates_is_pointed_out_once(
    has_bfloat16, config_file, tmp_path, capsys, caplog, monkeypatch, shared_pipe
):
    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(making, "cpu_has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(making, "load_pipeline", load)
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK]
    warned = {"auto": 0, "float32": 0, "float16": 1, "bfloat16": int(not has_bfloat16)}
    for dtype, count in warned.items():
        with pytest.raises(Loaded):
            main([*flags, "--dtype", dtype])
        assert capsys.readouterr().err.count(f"warning: --dtype {dtype}: CPUs like this one only imitate it") == count


def test_diffusers_does_not_repeat_that_float16_is_slow_on_a_cpu(base):
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        making.load_pipeline(base, torch.device("cpu"), torch.float16, show_progress=False)
    finally:
        logger.removeHandler(handler)
    assert not [message for message in heard if "float16" in message]


def test_a_terminal_has_bars_and_loading_leaves_them_as_they_were(monkeypatch):
    from transformers.utils import logging

    for is_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with console.quiet_loading(logging):
            assert logging.is_progress_bar_enabled() == is_terminal
        assert logging.is_progress_bar_enabled()
        assert list(console.shown(["a", "b"], "picture", str.upper)) == ["a", "b"]
        assert ("\r" in stream.getvalue()) == is_terminal
        assert (stream.getvalue() == "1/2 A\n2/2 B\n") != is_terminal


def test_notes_on_torchvision_are_no_news_and_others_are(monkeypatch):
    logger, handler = logging.getLogger("transformers.utils.import_utils"), logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()[:4]))
    heard: list[str] = []
    logger.addHandler(handler)
    try:
        with console.quiet_imports():
            logger.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back to …")
            logger.warning("this one matters")
        logger.warning("`CLIPImageProcessor` requires torchvision: nobody asked for quiet")
    finally:
        logger.removeHandler(handler)
    assert heard == ["this", "`CLI"]


@pytest.mark.slow
def test_a_fresh_process_says_nothing_but_which_pictures_it_made(tmp_path):
    command = [sys.executable, str(ROOT / "generate_images.py"), "--output_dir", str(tmp_path), "--num_images", "1"]
    command += ["--generation_config", str(ROOT / "configs" / "guidance_conf_two.json"), "--num_inference_steps", "1"]
    run = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    (picture,) = tmp_path.rglob("0000.png")
    assert run.stderr.decode() == f"1/1 {picture}\n"
    assert run.stdout.decode() == f"contact sheet: {picture.with_name('contact_sheet.png')}\n"


@pytest.mark.parametrize(("rank", "size"), [("RANK", "WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")])
def test_only_the_first_of_several_processes_speaks(rank, size, monkeypatch, capsys):
    monkeypatch.setenv(rank, "1")
    assert console.is_main_process(), "the only one, whatever its number"
    monkeypatch.setenv(size, "2")
    assert list(console.shown(["a"], "picture", str.upper)) == ["a"]
    monkeypatch.setenv(rank, "0")
    assert list(console.shown(["b"], "picture", str.upper)) == ["b"]
    assert capsys.readouterr().err == "1/1 B\n"


def test_settings_of_a_strangers_picture_are_none(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("multisubject", "[" * 200_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "deep.png", pnginfo=info)
    assert read_settings(tmp_path / "deep.png") is None


def test_pictures_need_not_be_square(workshop, config_file, tmp_path, loaded):
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path), *QUICK, "--num_images", "1"]
    main([*flags, "--resolution", "48x80", "--num_inference_steps", "1"])
    assert Image.open(tmp_path / FOLDER / "0000.png").size == (80, 48)


def test_two_processes_make_the_pictures_of_one(gallery, config_file, tmp_path):
    flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "results"), *QUICK]
    first, second = run_in_two_processes(str(ROOT / "generate_images.py"), *flags)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.stderr.startswith("4 pictures, of which this process makes and counts 2 and the other 1 the rest.")
    assert "2/2" in first.stderr and "4/4" not in first.stderr  # half of the pictures each
    assert not second.stdout and not second.stderr
    pictures = sorted(gallery.rglob("000?.png"))
    assert len(pictures) == 4
    for picture in pictures:
        other = tmp_path / "results" / picture.relative_to(gallery)
        assert np.abs(pixels(other) - pixels(picture)).max() <= 1  # the number of threads may change the last bit
        assert settings_of(other) == settings_of(picture)
    assert first.stdout.count("contact sheet: ") == 2  # said once


def test_two_processes_give_way_to_another_run_together(config_file, tmp_path):
    folder = tmp_path / "results" / FOLDER
    folder.mkdir(parents=True)
    with locked(folder):
        flags = ["--generation_config", str(config_file), "--output_dir", str(tmp_path / "results"), *QUICK]
        first, second = run_in_two_processes(str(ROOT / "generate_images.py"), *flags)
    assert (first.code, second.code) == (2, 2), (first, second)
    assert f"another run is writing here (process {os.getpid()})" in first.stderr and not second.stderr
    assert not list(folder.iterdir())


def test_other_processes_leave_the_main_one_the_time_to_say_what_is_wrong(tmp_path, monkeypatch, capsys):
    """A launcher ends it when they end."""
    waited = []
    monkeypatch.setattr(generate_images.time, "sleep", waited.append)
    for rank, seconds in (("0", []), ("1", [10.0])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit):
            main(["--generation_config", str(tmp_path / "none.json")])
        assert waited == seconds and ("none.json" in capsys.readouterr().err) == (rank == "0")


def test_launched_processes_refuse_a_config_with_one_report(tmp_path):
    (tmp_path / "config.json").write_text('[{"promt": "a dog"}]')
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    script = [str(ROOT / "generate_images.py"), "--generation_config", str(tmp_path / "config.json"), *QUICK]
    result = subprocess.run(
        [sys.executable, *launch, *script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert result.stderr.count("did you mean 'prompt'?") == 1, result.stderr


def test_an_option_of_the_command_is_named_where_it_stands_as_a_key(tmp_path, base):
    path = tmp_path / "config.json"
    assert set(OPTIONS) <= {field.name for field in fields(GenerateArguments)}
    path.write_text(json.dumps([{"prompt": "a person", **dict.fromkeys(OPTIONS, 8)}]))
    with pytest.raises(ConfigError) as error:
        load_tasks(read_config(path), base)
    for name in OPTIONS:
        assert f"{name}: unknown key; `--{name}` says it for all entries." in str(error.value)
