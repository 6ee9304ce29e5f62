"""From a folder of pictures to upright pictures with masks and captions."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from multisubject.pictures import PICTURE_ERRORS, open_picture
from multisubject.training.pictures import Picture, bucket_size, check_size, crops, load_pictures


def save(path: Path, size: tuple[int, int] = (8, 6), colour: object = "red", **options: object) -> Path:
    Image.new(str(options.pop("mode", "RGB")), size, colour).save(path, **options)  # type: ignore[arg-type]
    return path


def test_pictures_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp", ".hidden.png", "notes.txt"):
        save(tmp_path / name, format="PNG") if not name.endswith("txt") else (tmp_path / name).write_text("x")
    assert [picture.path.name for picture in load_pictures(tmp_path)] == ["a.JPG", "b.png", "c.webp"]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    save(tmp_path / "a.tif", mode=mode, colour=1)
    assert load_pictures(tmp_path)[0].image.mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    save(tmp_path / "a.jpg", size=(40, 20), exif=exif)
    assert load_pictures(tmp_path)[0].image.size == (20, 40)


def test_transparency_is_a_mask_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (picture,) = load_pictures(tmp_path)
    assert picture.mask is not None
    assert np.asarray(picture.mask)[:, 0].tolist() == [255, 255, 0, 0]
    assert picture.image.getpixel((0, 3)) == (255, 255, 255)


@pytest.mark.parametrize("ink", [(255, 255, 255), (0, 0, 0)])
def test_mask_file_with_transparency_counts_by_it(ink: tuple[int, int, int], tmp_path: Path) -> None:
    Image.new("RGB", (4, 1), "red").save(tmp_path / "a.png")
    cut_out = Image.new("RGBA", (4, 1), (*ink, 0))
    cut_out.putpixel((1, 0), (*ink, 255))
    cut_out.save(tmp_path / "a_mask.png")
    (picture,) = load_pictures(tmp_path)
    assert picture.mask is not None
    assert np.asarray(picture.mask).tolist() == [[0, 255, 0, 0]]


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"floating-point values; save it with 8 or 16 bits"):
        load_pictures(tmp_path, strict=True)


def test_opaque_alpha_is_no_mask(tmp_path: Path) -> None:
    save(tmp_path / "a.png", mode="RGBA", colour=(1, 2, 3, 255))
    assert load_pictures(tmp_path)[0].mask is None


def test_mask_file_lies_beside_its_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "a_mask.png", mode="L", colour=200)
    (picture,) = load_pictures(tmp_path)
    assert picture.mask is not None
    assert picture.mask.size == picture.image.size


def test_captions_from_text_files_and_metadata(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(" a dog\non grass \n")
    rows = [{"file_name": "a.png", "text": "other"}, {"file_name": "b.png", "text": "a\u2028dog"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]  # a line separator may stand in JSON text
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert [picture.caption for picture in load_pictures(tmp_path)] == ["a dog on grass", "a dog", None]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"file_name": "a.png"}',
        '{"file_name": "a.png", "text": null}',
        "[1]",
        '{"file_name": "missing.png", "text": "a dog"}',
    ],
)
def test_broken_metadata_is_named(tmp_path: Path, line: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        load_pictures(tmp_path)


def test_damaged_picture_is_named_and_skipped_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = save(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    assert [picture.path.name for picture in load_pictures(tmp_path)] == ["whole.png"]
    assert "half.png" in caplog.text
    assert "text.jpg" in caplog.text
    with pytest.raises(ValueError, match=r"half\.png.*--strict"):
        load_pictures(tmp_path, strict=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_named_as_a_picture_and_is_no_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "2.jpg").mkdir()
    save(tmp_path / "2.jpg" / "inner.jpg")
    os.mkfifo(tmp_path / "3.png")  # which waits for somebody to write when it is opened
    save(tmp_path / "4.png")
    (tmp_path / "4_mask.png").symlink_to(tmp_path / "gone.png")
    save(tmp_path / "5.png")
    assert [picture.path.name for picture in load_pictures(tmp_path)] == ["0.png", "5.png"]
    problems = ("1.png is a link to what is not there", "2.jpg is a folder", "3.png is no file")
    for problem in (*problems, "4_mask.png is a link to what is not there"):
        assert f"cannot be used: {problem}, not a picture; skipped." in caplog.text
    for name in ("1.png", "2.jpg", "3.png", "4.png"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be used: .*mend or remove it"):
            load_pictures(tmp_path, strict=True)
        (tmp_path / name).rename(tmp_path / f"{name}.aside")
        if name == "4.png":
            (tmp_path / "4_mask.png").unlink()
    assert len(load_pictures(tmp_path, strict=True)) == 2


@pytest.mark.parametrize("refused", ["iterdir", "lstat"])  # a folder that may not be listed, or not entered
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path / "0.png")
    monkeypatch.setattr(Path, refused, refuse)  # root may read everything
    with pytest.raises(PermissionError, match=r"--instance_data_dir: .* cannot be read \(Permission denied\)") as error:
        load_pictures(tmp_path)
    assert f"{str(tmp_path)!r} cannot be read" in str(error.value)
    assert "metadata" not in str(error.value)


def test_damaged_avif_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of some damage Pillow's decoder speaks by a RuntimeError."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    save(tmp_path / "whole.png")
    data = save(tmp_path / "whole.avif", size=(64, 64)).read_bytes()
    kinds = set()
    for position in range(0, len(data), 3):
        damaged = data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
        (tmp_path / "whole.avif").write_bytes(damaged)
        try:
            open_picture(tmp_path / "whole.avif")
        except PICTURE_ERRORS as error:
            kinds.add(type(error))
            assert [picture.path.name for picture in load_pictures(tmp_path)] == ["whole.png"]
    assert RuntimeError in kinds


@pytest.mark.parametrize(("size", "colour", "words"), [((3, 3), 255, "3 x 3"), ((8, 6), 0, "empty")])
def test_wrong_mask_is_named(tmp_path: Path, size: tuple[int, int], colour: int, words: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "a_mask.png", mode="L", size=size, colour=colour)
    with pytest.raises(ValueError, match=words):
        load_pictures(tmp_path, strict=True)


def test_missing_and_empty_folders_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="instance_data_dir"):
        load_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no readable picture.*\.png"):
        load_pictures(tmp_path)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [((512, 512), (768, 768)), ((300, 200), (960, 640)), ((200, 300), (640, 960)), ((10_000, 10), (1536, 384))],
)
def test_buckets_keep_proportions_and_area(picture: tuple[int, int], expected: tuple[int, int]) -> None:
    assert bucket_size(*picture, resolution=768, multiple=64) == expected


def test_first_crop_is_the_centre_and_the_others_repeat_by_seed() -> None:
    pixels = np.arange(40 * 20, dtype=np.uint16).reshape(20, 40) % 251
    picture = Picture(Path("a"), Image.fromarray(pixels.astype(np.uint8)).convert("RGB"))
    views = [crop.image for crop in crops(picture, (20, 20), 3, random.Random(1))]
    assert np.array_equal(np.asarray(views[0]), np.asarray(picture.image)[:, 10:30])
    again = [crop.image for crop in crops(picture, (20, 20), 3, random.Random(1))]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(views, again, strict=True))
    assert not np.array_equal(np.asarray(views[1]), np.asarray(views[2]))


def test_mask_is_cropped_with_its_picture() -> None:
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[10:20, 20:30] = 255
    picture = Picture(Path("a"), Image.fromarray(pixels), Image.fromarray(pixels[..., 0]))
    for crop in crops(picture, (16, 16), 4, random.Random(0)):
        assert crop.mask is not None
        bright = np.asarray(crop.image)[..., 0] > 127
        assert (bright & (np.asarray(crop.mask) < 64)).sum() == 0


def test_a_crop_says_what_was_cut_off_in_its_own_pixels() -> None:
    """Columns and rows are numbered by their grey, so that a crop's edges say where they come from."""
    numbers = np.add.outer(np.arange(60), np.arange(120)).astype(np.uint8)
    picture = Picture(Path("a"), Image.fromarray(numbers).convert("RGB"))
    first, *others = crops(picture, (30, 30), 20, random.Random(0))
    assert (first.top, first.left, first.right) == (0, 15, 15)  # it is resized to 60 x 30, then cut
    assert len({(crop.top, crop.left) for crop in others}) > 10
    for crop in others:
        scale = (crop.left + 30 + crop.right) / 120  # of the resized picture
        assert 30 / 60 - 0.01 <= scale <= 30 / 48 + 0.01
        corner = float(np.asarray(crop.image)[0, 0, 0])
        assert abs(corner - (crop.top + crop.left) / scale) < 4


def test_heic_without_its_plugin_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert len(load_pictures(tmp_path)) == 1
    assert "b.HEIC" in caplog.text


@pytest.mark.parametrize(
    ("suffix", "module", "package"),
    [
        ("heic", "pillow_heif", "pillow-heif"),
        ("HEIF", "pillow_heif", "pillow-heif"),
        ("jxl", "pillow_jxl", "pillow-jxl"),
    ],
)
def test_pictures_of_plugins_say_which_one_or_are_read_with_it(
    tmp_path: Path, suffix: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"b.{suffix}").write_bytes(b"another format")
    for name in (module, "pillow_heif.HeifImagePlugin"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"b\.{suffix}: cannot be used: .*`pip install {package}"):
        load_pictures(tmp_path, strict=True)
    for name in (module, "pillow_heif.HeifImagePlugin"):
        monkeypatch.delitem(sys.modules, name)
    plugins = tmp_path / "plugins" / module
    plugins.mkdir(parents=True)
    plugin = f"from PIL import Image\nImage.init()\nfrom pathlib import Path\nPath({str(tmp_path)!r}, 'used').touch()\n"
    for name in ("__init__", "HeifImagePlugin"):
        (plugins / f"{name}.py").write_text(plugin)
    monkeypatch.syspath_prepend(str(plugins.parent))
    save(tmp_path / "a.png").rename(tmp_path / f"b.{suffix}")  # Pillow goes by the content
    assert len(load_pictures(tmp_path)) == 1
    assert (tmp_path / "used").exists()
    (tmp_path / f"b.{suffix}").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot be used: (?!.*pip install)"):
        load_pictures(tmp_path, strict=True)


@pytest.mark.parametrize(
    ("picture", "size", "words"),
    [
        ((64, 64), (64, 64), None),
        ((16, 16), (64, 64), None),
        ((15, 64), (64, 64), "15 x 64, too small to be enlarged 4 times to 64 x 64; expected at least 16 x 16"),
        ((1, 1), (512, 512), "1 x 1, too small to be enlarged 512 times"),
        ((3000, 4), (1024, 256), "3000 x 4, too small to be enlarged 64 times"),
        ((400, 100), (64, 64), None),
        ((401, 100), (64, 64), "401 x 100, of which a crop of 64 : 64 would keep 25%; crop it around the subject"),
        ((100, 3000), (64, 256), "100 x 3000, of which a crop of 64 : 256 would keep 13%"),
    ],
)
def test_what_a_picture_has_to_have_for_a_training_size(
    picture: tuple[int, int], size: tuple[int, int], words: str | None
) -> None:
    looked_at = Picture(Path("a.png"), Image.new("RGB", picture))
    if words is None:
        check_size(looked_at, size, 4)
        return
    with pytest.raises(ValueError, match=words):
        check_size(looked_at, size, 4)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_mask_files_may_have_any_format(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "a.webp")
    save(tmp_path / f"a_mask.{suffix}", mode="L", colour=255)
    assert load_pictures(tmp_path)[0].mask is not None


def test_colour_picture_is_no_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    save(tmp_path / "b_mask.png", colour="red")
    assert [picture.path.name for picture in load_pictures(tmp_path)] == ["a.png"]
    assert "b.png: cannot be used: b_mask.png is a colour picture; expected a mask, white where" in caplog.text


def test_folder_of_subjects_is_not_taken_for_one(tmp_path: Path) -> None:
    save(tmp_path / "subjects.png")
    (tmp_path / "rex").mkdir()
    (tmp_path / "empty").mkdir()
    save(tmp_path / "rex" / "a.png")
    with pytest.raises(ValueError, match=r"1 picture\(s\) and folders of pictures.*such as '.*rex'"):
        load_pictures(tmp_path)
    save(tmp_path / "another.png")
    assert len(load_pictures(tmp_path)) == 2


def test_mask_of_no_picture_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "carnival_mask.png")
    assert [picture.path.name for picture in load_pictures(tmp_path)] == ["a.png"]
    assert "carnival_mask.png" in caplog.text
    with pytest.raises(ValueError, match=r"carnival_mask\.png: is the mask of no picture"):
        load_pictures(tmp_path, strict=True)


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.asarray(load_pictures(tmp_path)[0].image)[..., 0].tolist() == [[0, 100], [200, 255]]


def test_caption_files_of_windows_editors(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a dog".encode("utf-8-sig"))
    assert load_pictures(tmp_path)[0].caption == "a dog"
    (tmp_path / "a.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        load_pictures(tmp_path, strict=True)


def test_crop_without_the_subject_is_replaced_by_the_centre() -> None:
    mask = Image.new("L", (40, 20), 0)
    mask.putpixel((20, 10), 255)
    picture = Picture(Path("a"), Image.new("RGB", (40, 20)), mask)
    assert all(np.asarray(crop.mask).any() for crop in crops(picture, (20, 20), 40, random.Random(0)) if crop.mask)


def test_32_bit_files_may_hold_8_bit_values(tmp_path: Path) -> None:
    for values, expected in (([[0, 100], [200, 255]], [[0, 100], [200, 255]]), ([[0, 25700]], [[0, 100]])):
        Image.fromarray(np.array(values, np.int32)).save(tmp_path / "grey.tif")
        assert np.asarray(open_picture(tmp_path / "grey.tif")).tolist() == expected


def test_masks_that_are_not_used_are_not_looked_at(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 100)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    Image.new("L", (3, 3)).save(tmp_path / "1_mask.png")
    assert [picture.mask is None for picture in load_pictures(tmp_path, use_masks=False)] == [True, True]
    assert [picture.path.name for picture in load_pictures(tmp_path)] == ["0.png"]
    with pytest.raises(FileNotFoundError, match=r"--class_data_dir: .*nowhere"):
        load_pictures(tmp_path / "nowhere", flag="class_data_dir")
