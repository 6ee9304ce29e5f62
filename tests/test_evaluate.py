import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Owlv2Config,
    Owlv2ForObjectDetection,
    ViTConfig,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)

from multisubject import evaluate
from multisubject.evaluate import main
from multisubject.evaluation.arguments import DEFAULT_MODELS, EvaluateArguments, EvaluationError, read_pairs
from multisubject.evaluation.intervals import bootstrap_interval, summarize
from multisubject.evaluation.models import Detection, best_detections, box_iou
from multisubject.evaluation.pictures import Crop, Picture, Target, _subject_of
from multisubject.evaluation.results import TOTAL, summaries
from multisubject.evaluation.scores import METRICS, _assign, layout_score, match
from multisubject.generation.picture_files import save_picture
from multisubject.layout import Region, parse_layout

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


# --- tiny models of random weights ---------------------------------------------------------------------------------

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
NORMALIZED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.26, 0.26, 0.27],
}
# As in the repositories of the released models, most of them older than the processors' present names.
PROCESSORS = {
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "size": 32, "crop_size": 32},
    "dino": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
    },
    "owl": {
        "image_processor_type": "Owlv2ImageProcessor",
        "processor_class": "Owlv2Processor",
        "do_pad": True,
        "size": {"height": 32, "width": 32},
    },
    "yolos": {"image_processor_type": "YolosImageProcessor", "size": {"shortest_edge": 32, "longest_edge": 64}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> folder of a model as it would be downloaded."""
    folder = tmp_path_factory.mktemp("models")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    text = {
        **VISION,
        "vocab_size": len(tokens),
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "clip": CLIPModel(
                CLIPConfig(text_config={**text, "max_position_embeddings": 32}, vision_config=VISION, projection_dim=8)
            ),
            "dino": ViTModel(ViTConfig(**VISION), add_pooling_layer=False),
            "dinov2": Dinov2Model(Dinov2Config(**VISION)),
            "owl": Owlv2ForObjectDetection(
                Owlv2Config(
                    text_config={**text, "max_position_embeddings": 32}, vision_config=VISION, projection_dim=16
                )
            ),
            "yolos": YolosForObjectDetection(
                YolosConfig(**VISION | {"image_size": [32, 32]}, num_detection_tokens=6, id2label={0: "Dog", 1: "cat"})
            ),
        }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(NORMALIZED | PROCESSORS[name]))
    for name, length in (("clip", 32), ("owl", 32)):
        CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length).save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


@pytest.fixture
def all_models(models):
    return ["--clip_model", models["clip"], "--dino_model", models["dino"], "--detector", models["owl"]]


# --- pictures ------------------------------------------------------------------------------------------------------


def drawing(seed, size=(64, 48)):
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(generator.integers(256, size=3).tolist()))
    for _ in range(4):
        x, y = generator.integers(40, size=2).tolist()
        ImageDraw.Draw(image).ellipse([x, y, x + 20, y + 16], fill=tuple(generator.integers(256, size=3).tolist()))
    return image


def folder_of(path, *images):
    path.mkdir(parents=True)
    for index, image in enumerate(images):
        image.save(path / f"{index:04d}.png")
    return path


def settings(**changes):
    subjects = {"person": {"source": "embeddings/petrucci.pt", "class_phrase": "person", "sha256": ""}}
    return {"prompt": "a photo of <person>", "subjects": subjects, "height": 48, "width": 64} | changes


def run(*argv):
    main(["--device", "cpu", *map(str, argv)])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def plain(tmp_path):
    """Arguments for two plain pictures of different sizes, and two references of one subject."""
    pictures = folder_of(tmp_path / "pictures", drawing(1), drawing(2, (48, 64)))
    references = folder_of(tmp_path / "petrucci", drawing(3), drawing(4))
    return ["--pictures", pictures, "--prompt", "a dog", "--references", f"petrucci={references}"]


# --- scores of single things ---------------------------------------------------------------------------------------


def test_iou_is_what_two_boxes_share():
    assert box_iou(LEFT, LEFT) == 1 and box_iou(LEFT, RIGHT) == 0
    assert box_iou(LEFT, (0.25, 0.0, 0.75, 1.0)) == pytest.approx(1 / 3)


def test_doubles_and_empty_boxes_are_no_detections():
    best, double, other = Detection(LEFT, 0.9), Detection((0.0, 0.0, 0.4, 1.0), 0.8), Detection(RIGHT, 0.1)
    assert best_detections([other, double, Detection((1.0, 0.0, 1.0, 1.0), 0.99), best]) == [best, other]


def test_layout_score_of_a_detection_in_its_region_in_another_one_and_of_none():
    (region,) = parse_layout({"dog": LEFT}, height=48, width=64)
    assert layout_score(LEFT, region) == (1.0, 1.0)
    assert layout_score(RIGHT, region) == (0.0, 0.0)
    assert layout_score(None, region) == (0.0, 0.0)
    iou, centre = layout_score((0.0, 0.0, 1.0, 1.0), region)
    assert (iou, centre) == (pytest.approx(0.5), 0.0)  # its centre is the first column of the right half


def test_layout_score_in_the_notch_of_a_mask_overlaps_its_bounds_but_is_not_inside():
    mask = np.ones((10, 10), np.float32)
    mask[:5, :5] = 0
    assert layout_score((0.0, 0.0, 0.4, 0.4), Region("dog", mask)) == (pytest.approx(0.16), 0.0)
    assert layout_score((0.6, 0.6, 1.0, 1.0), Region("dog", mask / 3))[1] == 1.0, "relative to the mask's peak"


def test_each_target_gets_a_detection_of_its_own():
    assert match(np.array([[0.9, 0.8], [0.95, 0.1]])) == [1, 0]
    assert match(np.array([[0.1], [0.2]])) == [None, 0]
    assert match(np.zeros((2, 0))) == [None, None]


def test_a_forbidden_pair_is_not_made_even_if_nothing_else_is_left():
    assert match(np.array([[0.9, -np.inf], [0.5, -np.inf]])) == [0, None]
    assert match(np.array([[-np.inf]])) == [None]


def test_two_dogs_are_told_apart_by_their_regions_or_else_by_their_looks():
    regions = parse_layout({"rex": RIGHT, "bella": LEFT}, height=8, width=8)
    found = {(Path("p"), "dog"): [Detection(LEFT, 0.9), Detection(RIGHT, 0.8), Detection((0.4, 0.4, 0.6, 0.6), 0.7)]}
    placed = [Target(region.subject, "dog", region.subject, region) for region in regions]
    free = [Target(region.subject, "dog", region.subject) for region in regions]
    expected = [Detection(RIGHT, 0.8), Detection(LEFT, 0.9)]
    assert _assign(Picture(Path("p"), "", "", tuple(placed)), found, None) == expected
    looks = {("rex", RIGHT): 0.9, ("bella", LEFT): 0.8}
    looks_like = lambda crop, name: looks.get((name, crop.box), 0.1)  # noqa: E731
    assert _assign(Picture(Path("p"), "", "", tuple(free)), found, looks_like) == expected


PETRUCCI, SLASH = Target("petrucci", "person", "petrucci"), Target("slash", "man", "slash")


def assigned(*targets, looks_like=None, **found):
    """Boxes of the targets; `found` is phrase -> (box, score), best first."""
    detections = {(Path("p"), phrase): [Detection(*one) for one in ones] for phrase, ones in found.items()}
    return [one and one.box for one in _assign(Picture(Path("p"), "", "", targets), detections, looks_like)]


def placed(target, box):
    return replace(target, region=parse_layout({target.name: box}, height=8, width=8)[0])


def test_one_thing_with_two_names_belongs_to_the_target_that_it_looks_like():
    nearly = (0.0, 0.0, 0.45, 1.0)
    found = {"person": [(LEFT, 0.9)], "man": [(nearly, 0.8)]}
    for subject, boxes in (("petrucci", [LEFT, None]), ("slash", [None, nearly])):
        looks_like = lambda crop, name, subject=subject: 0.9 if name == subject else 0.1  # noqa: E731
        assert assigned(PETRUCCI, SLASH, **found, looks_like=looks_like) == boxes


def test_one_thing_with_two_names_belongs_to_the_target_whose_region_it_is_in():
    found = {"person": [(RIGHT, 0.9)], "man": [(RIGHT, 0.9)]}
    assert assigned(placed(PETRUCCI, LEFT), placed(SLASH, RIGHT), **found) == [None, RIGHT]
    found = {"person": [(LEFT, 0.9), (RIGHT, 0.8)], "man": [(LEFT, 0.9), (RIGHT, 0.8)]}
    assert assigned(placed(PETRUCCI, RIGHT), placed(SLASH, LEFT), **found) == [RIGHT, LEFT]


def test_without_regions_and_references_as_many_targets_as_possible_are_found():
    targets = [replace(target, reference=None) for target in (PETRUCCI, SLASH)]
    assert assigned(*targets, person=[(LEFT, 0.9), (RIGHT, 0.8)], man=[(LEFT, 0.85)]) == [RIGHT, LEFT]
    assert assigned(*targets, person=[(LEFT, 0.9)], man=[]) == [LEFT, None]


def test_a_target_gets_nothing_that_its_own_phrase_did_not_find():
    dog = Target("rex", "dog", "rex")
    looks_like = lambda crop, name: 0.9  # noqa: E731
    assert assigned(PETRUCCI, dog, person=[(LEFT, 0.9), (RIGHT, 0.8)], looks_like=looks_like) == [LEFT, None]


def test_targets_that_want_different_things_get_the_best_detection_of_their_phrase():
    """Even if another one lies in the region: that is the layout's score, and not for the choice."""
    guitar, middle = Target("majesty", "guitar", "majesty"), (0.4, 0.4, 0.6, 0.6)
    found = {"person": [(RIGHT, 0.9), (LEFT, 0.8)], "guitar": [(middle, 0.9), (RIGHT, 0.8)]}
    assert assigned(placed(PETRUCCI, LEFT), placed(guitar, RIGHT), **found) == [RIGHT, middle]


def test_a_region_may_call_its_subject_by_the_class_phrase():
    targets = {"rex": Target("rex", "dog", "rex")}
    mask, prompt = np.ones((2, 2), np.float32), "a dog and <rex> and a <cat> on a hotdog"
    assert _subject_of(Region("dog", mask, occurrence=1), prompt, targets) == "dog"
    assert _subject_of(Region("dog", mask, occurrence=2), prompt, targets) == "rex"
    assert _subject_of(Region("dog", mask), "a photo of <rex>", targets) == "rex"
    assert _subject_of(Region("red ball", mask), prompt, targets) == "red ball"


def test_a_region_may_write_its_subject_in_any_case():
    mask, targets = np.ones((2, 2), np.float32), {"rex": Target("rex", "dog", "rex")}
    assert _subject_of(Region("Rex", mask), "a photo of <rex>", targets) == "rex"
    assert _subject_of(Region("Dog", mask), "a photo of <REX>", targets) == "rex"
    assert _subject_of(Region("Dog", mask, occurrence=2), "a dog and <rex>", targets) == "rex"


def test_bootstrap_interval_narrows_with_more_pictures():
    few, many = (bootstrap_interval(np.tile([0.0, 1.0], count)) for count in (10, 1000))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]


def test_intervals_hold_the_mean_and_need_two_values():
    summary = summarize([0.1, 0.2, 0.6])
    assert summary["low"] < summary["mean"] < summary["high"] and summary["count"] == 3
    assert summary == summarize([0.1, 0.2, 0.6])
    assert summarize([0.3]) == {"mean": 0.3, "low": None, "high": None, "count": 1}


def test_a_folder_of_any_name_leaves_the_mean_of_all_pictures_alone():
    records = [
        {"folder": folder, "scores": {"dino": score}, "targets": []}
        for folder, score in (("all", 0.0), (str(Path(TOTAL)), 0.5), ("b", 1.0))
    ]
    folders = summaries(records)["folders"]
    assert {name: (row["dino"]["mean"], row["dino"]["count"]) for name, row in folders.items()} == {
        TOTAL: (0.5, 3),
        "all": (0.0, 1),
        "(all)": (0.5, 1),
        "b": (1.0, 1),
    }


def test_16_bits_of_grey_become_8(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(Crop(tmp_path / "grey.png").load())[0, :, 0].tolist() == [0, 128, 255]


def test_crops_are_square_and_upright(tmp_path):
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert Crop(tmp_path / "turned.png").load().size == (20, 40)
    assert Crop(tmp_path / "turned.png").load().getpixel((3, 3)) == (255, 255, 255)
    assert Crop(tmp_path / "turned.png", (0.0, 0.0, 0.5, 1.0)).load().size == (40, 40)


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_a_picture_that_equals_its_reference_is_alike_in_every_way(tmp_path, all_models, capsys):
    pictures = folder_of(tmp_path / "pictures", drawing(1))
    references = folder_of(tmp_path / "petrucci", drawing(1))
    common = ["--pictures", pictures, "--prompt", "a <petrucci>", "--references", f"petrucci={references}"]
    run(*common, *all_models, "--class_phrases", "petrucci=dog", "--detection_threshold", 0)
    result = read(pictures / "evaluation.json")
    scores = result["pictures"][0]["scores"]
    for metric in ("clip_i", "dino", "found", "clip_i_own", "dino_own"):
        assert scores[metric] == pytest.approx(1, abs=1e-5)
    assert result["pictures"][0]["prompt"] == "a dog", "a subject's name in --prompt stands for its class phrase"
    assert -1 <= scores["clip_t"] <= 1 and "dino_leak" not in scores and "iou" not in scores
    assert result["subjects"]["petrucci"]["dino"]["count"] == 1 and not result["warnings"]
    assert "| (all) | 1 | " in capsys.readouterr().out
    assert Image.open(pictures / "evaluation.png").width > 256

    run(*common, *all_models, "--class_phrases", "petrucci=dog", "--detection_threshold", 0)
    assert len(read(pictures / "evaluation.json")["pictures"]) == 1, "its own sheet was taken for a picture"


def test_batch_size_does_not_matter(plain, all_models, tmp_path):
    results = []
    for batch_size in (1, 3):
        output = tmp_path / f"{batch_size}.json"
        options = ["--class_phrases", "petrucci=dog", "--detection_threshold", 0, "--output", output]
        run(*plain, *all_models, *options, "--batch_size", batch_size)
        results.append(read(output)["pictures"])
    for one, three in zip(*results, strict=True):
        assert one["scores"] == pytest.approx(three["scores"], abs=1e-5) and len(one["scores"]) == 6


def test_what_a_detector_does_not_find_is_missing_not_alike(plain, all_models):
    run(*plain, *all_models, "--class_phrases", "petrucci=dog", "--detection_threshold", 1)
    result = read(Path(plain[1]) / "evaluation.json")
    (target,) = result["pictures"][0]["targets"]
    assert target["detection"] is None and target["scores"]["found"] == 0
    assert "dino" in target["scores"] and "dino_own" not in target["scores"]
    assert "2 of 2 references" in result["warnings"][0]


def test_models_that_are_not_asked_for_are_left_out(plain, models, capsys):
    run(*plain, "--dino_model", models["dinov2"])
    assert set(read(Path(plain[1]) / "evaluation.json")["pictures"][0]["scores"]) == {"dino"}
    out, err = capsys.readouterr()
    assert "Without --clip_model, --detector" in out
    assert not err, "bars are for terminals"


def test_pictures_of_generate_images_say_what_they_were_to_show(tmp_path, models, all_models, monkeypatch):
    """Through the real settings of a real task, so that this notices when either side changes."""
    from multisubject.generation.arguments import GenerateArguments
    from multisubject.generation.base_model import BaseModel
    from multisubject.generation.config_file import read_config
    from multisubject.generation.making import task_settings
    from multisubject.generation.tasks import load_tasks
    from multisubject.hub_utils import save_subject
    from multisubject.residual_embeddings import ResidualEmbedding
    from multisubject.tiny_world import EMBEDDED_BASE

    base = BaseModel.read(str(EMBEDDED_BASE))
    for name, phrase in (("petrucci", "person"), ("majesty", "guitar")):
        residual = torch.ones(len(base.tokenizers["text_encoder"].tokenize(phrase)), base.embed_dims["text_encoder"])
        save_subject(ResidualEmbedding(phrase, {"text_encoder": residual}), tmp_path / "embeddings" / f"{name}.pt")
    colours = Image.new("RGB", (64, 64), "blue")
    colours.paste((255, 0, 0), (0, 0, 32, 64))
    colours.save(tmp_path / "layout.png")
    entry = {
        "prompt": "a photo of person and guitar",
        "residual_dict": {"person": "embeddings/petrucci.pt", "guitar": "embeddings/majesty.pt"},
        "layout": "layout.png",
        "color_context": {"255,0,0": ["person", 2.5], "0,0,255": ["guitar", 2.5]},
    }
    (tmp_path / "config.json").write_text(json.dumps([entry]))
    (task,), _ = load_tasks(read_config(tmp_path / "config.json"), base, (64, 64))
    made = task_settings(task, GenerateArguments(str(tmp_path / "config.json")), torch.float32, base)
    folder = tmp_path / "results" / task.folder
    for index in range(2):
        save_picture(drawing(index, (64, 64)), folder / f"{index:04d}.png", made | {"seed": index})
    save_picture(drawing(0), folder / "0000_attention.png", made)
    drawing(0).save(folder / "contact_sheet.png")
    names = ("petrucci", "majesty")
    references = [f"{name}={folder_of(tmp_path / name, drawing(index, (64, 64)))}" for index, name in enumerate(names)]

    monkeypatch.chdir(tmp_path)
    command = ["--pictures", "results", "--references", *references, "--detection_threshold", 0]
    run(*command, *all_models)
    result = read(tmp_path / "results" / "evaluation.json")
    assert not result["warnings"] and list(result["folders"]) == [TOTAL, str(task.folder)]
    first = result["pictures"][0]
    assert len(result["pictures"]) == 2 and first["prompt"] == "a photo of person and guitar"
    assert [(row["name"], row["phrase"]) for row in first["targets"]] == [("petrucci", "person"), ("majesty", "guitar")]
    assert first["targets"][0]["scores"]["dino"] == pytest.approx(1, abs=1e-5)
    assert set(first["scores"]) == set(METRICS)
    assert first["targets"][0]["scores"]["dino_leak"] != first["targets"][0]["scores"]["dino_own"]

    # The colour map becomes another one: its old pictures can no longer be held to it.
    command += ["--detector", models["owl"]]
    colours.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "layout.png")
    run(*command)
    result = read(tmp_path / "results" / "evaluation.json")
    assert "changed" in result["warnings"][0] and "iou" not in result["pictures"][0]["scores"]
    (tmp_path / "layout.png").unlink()
    run(*command)
    result = read(tmp_path / "results" / "evaluation.json")
    assert "layout.png" in result["warnings"][0] and "--generation_config" in result["warnings"][0]
    save_picture(drawing(0, (64, 64)), folder / "0000.png", made | {"layout": "~nobody-here/x.png"})  # a stranger's
    run(*command)
    assert any("home directory" in warning for warning in read(tmp_path / "results" / "evaluation.json")["warnings"])


def test_a_detector_of_fixed_classes(tmp_path, models, plain, capsys):
    options = ["--detector", models["yolos"], "--detection_threshold", 0]
    run(*plain, *options, "--class_phrases", "petrucci=dog")
    assert "found" in read(Path(plain[1]) / "evaluation.json")["pictures"][0]["scores"]
    with pytest.raises(SystemExit):
        run(*plain, *options, "--class_phrases", "petrucci=guitar")
    message = capsys.readouterr().err
    assert "no class 'guitar'" in message and "cat, dog" in message


def test_a_damaged_picture_is_named_and_counted(plain, models, capsys):
    (Path(plain[1]) / "bad.png").write_bytes((Path(plain[1]) / "0000.png").read_bytes()[:100])
    run(*plain, "--dino_model", models["dino"])
    result = read(Path(plain[1]) / "evaluation.json")
    assert len(result["pictures"]) == 2 and [Path(path).name for path in result["damaged"]] == ["bad.png"]
    out, err = capsys.readouterr()
    assert "1 damaged" in out and "bad.png" in err


def test_a_picture_for_which_a_plugin_is_missing_is_named_and_counted(plain, models, capsys):
    (Path(plain[1]) / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    run(*plain, "--dino_model", models["dino"])
    assert [Path(path).name for path in read(Path(plain[1]) / "evaluation.json")["damaged"]] == ["b.HEIC"]
    out, err = capsys.readouterr()
    assert "1 damaged" in out and "b.HEIC cannot be read as a picture" in err and "PNG" in err


def test_scores_are_shown_if_they_cannot_be_written(plain, models, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_atomically", full)
    with pytest.raises(SystemExit) as exit:
        run(*plain, "--dino_model", models["dino"])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and "| (all) | 2 | " in out and "contact sheet:" not in out
    assert f"--output is {str(Path(plain[1]) / 'evaluation.json')!r}" in err and "No space left" in err


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(plain, models):
    plain[plain.index("a dog")] = "a very long story of a dog and a cat and a guitar"
    run(*plain, "--clip_model", models["clip"])
    assert "32 tokens" in read(Path(plain[1]) / "evaluation.json")["warnings"][0]


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(capsys, *argv):
    """The message of a run that ends with status 2, and leaves nothing behind."""
    with pytest.raises(SystemExit) as exit:
        run(*argv)
    assert exit.value.code == 2
    assert not list(Path(argv[1]).rglob("evaluation*")), "something was written"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--batch_size", 0], "--batch_size is 0"),
        (["--detection_threshold", 2], "--detection_threshold is 2.0"),
        (["--detector_query", "a dog"], "--detector_query is 'a dog'"),
        (["--output", "scores.txt"], "--output is 'scores.txt'"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--references", "petrucci"], "--references has 'petrucci'; expected NAME=VALUE"),
        (["--references", "petrucci=nowhere"], "--references petrucci: 'nowhere' is not a folder"),
        (["--class_phrases", "slash=person"], "--class_phrases names ['slash']"),
        (["--class_phrases"], "expected at least one argument"),
    ],
)
def test_bad_arguments_are_refused(change, expected, plain, capsys):
    assert expected in refused(capsys, *plain, "--dino_model", "never/loaded", *change)


def test_an_output_that_cannot_be_written_is_refused_before_any_model_is_loaded(plain, tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "scores.json", tmp_path / "file" / "folder" / "scores.json"):
        message = refused(capsys, *plain, "--dino_model", "never/loaded", "--output", output)
        assert f"--output is {str(output)!r}" in message and "can be made and written" in message
    (tmp_path / "folder.json").mkdir()
    message = refused(capsys, *plain, "--dino_model", "never/loaded", "--output", tmp_path / "folder.json")
    assert "--output is" in message and "expected a name that is free" in message


def test_the_contact_sheet_never_replaces_a_picture(plain, capsys):
    picture = Path(plain[1]) / "0001.png"
    before = picture.read_bytes()
    message = refused(capsys, *plain, "--dino_model", "never/loaded", "--output", picture.with_suffix(".json"))
    assert "--output is" in message and f"there is already {str(picture)!r}" in message
    assert picture.read_bytes() == before and not picture.with_suffix(".json").exists()


def test_scores_never_replace_a_file_of_another_kind(plain, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('[{"prompt": "a dog"}]')
    message = refused(capsys, *plain, "--dino_model", "never/loaded", "--output", config)
    assert "--output is" in message and "not of an evaluation" in message
    assert config.read_text() == '[{"prompt": "a dog"}]'


def test_dino_without_references_is_refused(tmp_path, capsys):
    assert "--dino_model is 'x' without --references" in refused(capsys, "--pictures", tmp_path, "--dino_model", "x")


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert "no readable picture" in refused(capsys, "--pictures", tmp_path, "--clip_model", "never/loaded")


def test_a_picture_without_settings_needs_a_prompt_and_class_phrases(plain, capsys):
    message = refused(capsys, *plain, "--detector", "never/loaded")
    assert "--class_phrases has none for ['petrucci']" in message and "0000.png" in message
    del plain[2:4]
    message = refused(capsys, *plain, "--clip_model", "never/loaded")
    assert "--prompt is not given" in message and "0000.png" in message


def test_references_and_subjects_must_belong_together(tmp_path, capsys):
    save_picture(drawing(1), tmp_path / "results" / "0000.png", settings())
    other = folder_of(tmp_path / "slash", drawing(2))
    common = ["--pictures", tmp_path / "results", "--dino_model", "never/loaded", "--references"]
    message = refused(capsys, *common, f"slash={other}")
    assert "--references has nothing for the subject 'person'" in message and "person=FOLDER" in message
    assert "['person', 'petrucci']" in refused(capsys, *common, f"petrucci={other}", f"person={other}")
    message = refused(capsys, *common, f"petrucci={other}", f"slash={other}")
    assert "--references names ['slash'], which no picture shows; the pictures show ['petrucci']" in message


@pytest.mark.parametrize("broken", [{"prompt": 5}, {"subjects": ["person"]}, {"subjects": {"person": {}}}, []])
def test_settings_that_are_none_of_ours_are_refused(broken, tmp_path, capsys):
    save_picture(drawing(1), tmp_path / "0000.png", settings() | broken if broken else broken)
    message = refused(capsys, "--pictures", tmp_path, "--clip_model", "never/loaded")
    assert "0000.png are not those of multisubject-generate" in message


def test_pairs_name_each_subject_once():
    assert read_pairs("--x", ["a=b=c"]) == {"a": "b=c"}
    with pytest.raises(EvaluationError, match="each name once"):
        read_pairs("--x", ["a=b", "a=c"])


@pytest.mark.parametrize(
    ("option", "model", "expected"),
    [
        ("--clip_model", "dino", "a ViTModel; expected a model with an image and a text tower"),
        ("--dino_model", "clip", "a CLIPModel without a class token"),
        ("--detector", "dino", "cannot be loaded"),
        ("--dino_model", "nowhere", "cannot be loaded"),
    ],
)
def test_models_of_another_kind_are_refused(option, model, expected, plain, models, capsys):
    models = {**models, "nowhere": "./nowhere"}
    message = refused(capsys, *plain, option, models[model], "--class_phrases", "petrucci=dog")
    assert f"{option} is {models[model]!r}" in message and expected in message


@pytest.mark.parametrize(("option", "model"), [("--clip_model", "clip"), ("--detector", "owl")])
def test_a_model_whose_tokenizer_is_missing_or_broken_is_refused(option, model, plain, models, tmp_path, capsys):
    broken = Path(shutil.copytree(models[model], tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{")
    command = [*plain, "--class_phrases", "petrucci=dog", option, broken]
    assert f"{option} is {str(broken)!r} and cannot be loaded" in refused(capsys, *command)
    for file in (*broken.glob("*token*"), *broken.glob("vocab*"), *broken.glob("merges*")):
        file.unlink()
    message = refused(capsys, *command)
    assert f"{option} is {str(broken)!r}" in message and "same tokens for 'cat' and 'dog'" in message


def test_files_that_could_run_code_are_never_loaded(plain, models, tmp_path, capsys):
    pickled = Path(shutil.copytree(models["dino"], tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "safetensors" in refused(capsys, *plain, "--dino_model", pickled)

    coded = Path(shutil.copytree(models["dino"], tmp_path / "coded"))
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot be loaded" in refused(capsys, *plain, "--dino_model", coded)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_weights_missing_or_broken_is_refused(plain, models, tmp_path, capsys):
    broken = Path(shutil.copytree(models["dino"], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in weights if key.endswith("cls_token"))
    save_file({**weights, name: weights[name] * torch.nan}, broken / "model.safetensors", {"format": "pt"})
    assert "not finite" in refused(capsys, *plain, "--dino_model", broken)
    del weights[name]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights" in refused(capsys, *plain, "--dino_model", broken)


def test_without_any_model_all_are_used_but_dino_needs_references():
    assert EvaluateArguments(["p"], device="cpu").dino_model is None
    args = EvaluateArguments(["p"], ["a=b"], device="cpu")
    assert {name: getattr(args, name) for name in DEFAULT_MODELS} == DEFAULT_MODELS
    assert EvaluateArguments(["p"], clip_model="x", device="cpu").detector is None


def test_help_shows_an_example_and_says_what_was_never_tried(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--references petrucci=data/petrucci" in text and "never with released ones" in text
