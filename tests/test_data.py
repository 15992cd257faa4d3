"""Any picture becomes upright RGB; captions come from where they are promised; what is wrong is said in one line."""

import json
import os
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dit import pictures
from dit.data import describe_pictures, encode, find_captions, find_pictures, load_images
from dit.pictures import check_picture_path, grid, open_picture, square, to_pil, to_tensor
from dit.pipeline import Pipeline
from sparsecode.common import UserError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixel(path, x=2, y=2):
    image = open_picture(path)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def test_a_grey_and_a_1_bit_picture(tmp_path):
    Image.new("L", (20, 20), 100).save(tmp_path / "grey.png")
    Image.new("1", (20, 20), 1).save(tmp_path / "bit.png")
    assert pixel(tmp_path / "grey.png") == (100, 100, 100)
    assert pixel(tmp_path / "bit.png") == WHITE


def test_a_palette(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(0, (10, 0, 20, 20))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert pixel(tmp_path / "plain.png") == pixel(tmp_path / "clear.png") == RED
    assert pixel(tmp_path / "plain.png", 15) == (0, 0, 255)
    assert pixel(tmp_path / "clear.png", 15) == WHITE


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (20, 20), (100, 255)).save(tmp_path / "la.png")
    assert pixel(tmp_path / "clear.png") == WHITE
    assert pixel(tmp_path / "half.png") == (255, 127, 127)
    assert pixel(tmp_path / "la.png") == (100, 100, 100)


@pytest.mark.parametrize("value, grey", [(65535, 255), (257 * 100, 100), (200, 1)])
def test_16_bit_grey_keeps_its_brightness(tmp_path, value, grey):
    Image.fromarray(np.full((20, 20), value, np.uint16)).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png") == (grey, grey, grey)


def test_a_turned_photo_stands_upright(tmp_path):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 20, 20))  # red on the left; orientation 6 turns left to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = open_picture(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    assert np.abs(np.array(upright.getpixel((10, 8))) - RED).max() < 10
    assert np.abs(np.array(upright.getpixel((10, 32))) - WHITE).max() < 10


def test_cmyk(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    assert np.abs(np.array(pixel(tmp_path / "print.jpg")) - RED).max() < 10


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp"])
def test_of_an_animation_the_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(tmp_path / name) == RED


def test_pictures_that_cannot_be_used(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    for name, reason in {"text.png": "cannot be read", "cut.png": "cannot be read", "cut.jpg": "cannot be read",
                         "dot.png": "1×1 pixels", "absent.png": "cannot be read"}.items():  # fmt: skip
        with pytest.raises(UserError, match=reason) as error:
            open_picture(tmp_path / name)
        assert name in str(error.value)


def test_the_middle_square(tmp_path):
    image = Image.new("RGB", (60, 20), "blue")
    image.paste(RED, (15, 0, 45, 20))  # wider than the middle, so that no blue is smoothed into it
    image.save(tmp_path / "wide.png")
    assert set(square(image, 16).getdata()) == {RED}
    images = load_images([tmp_path / "wide.png"], 16)
    assert images.shape == (1, 3, 16, 16)
    assert torch.equal(images[0, :, 8, 8], torch.tensor([1.0, -1.0, -1.0]))


def test_there_and_back():
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 12, 3), dtype=np.uint8)) for i in (0, 1)]
    assert [back.tobytes() for back in to_pil(to_tensor(images))] == [image.tobytes() for image in images]


def test_a_grid_wraps_its_labels():
    row = [Image.new("RGB", (16, 16), RED)] * 2
    short, long = (grid([(label, row)], side=64) for label in ("word", "many words " * 8))
    assert short.width == long.width == 8 + 2 * 72
    assert long.height > short.height + 3 * 17
    for image in (short, long):
        assert image.getpixel((8 + 32, image.height - 8 - 32)) == RED


@pytest.mark.parametrize("name", ["x", "x.txt", "x.safetensors"])
def test_a_name_that_is_no_pictures(name):
    with pytest.raises(UserError, match="does not end like a picture"):
        check_picture_path(name)


# ---- files and captions -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        Image.new("RGB", (20, 20), RED).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("")
    return tmp_path


def test_a_folder_stands_for_its_pictures(folder):
    assert find_pictures([folder]) == [folder / "a.jpg", folder / "b.png"]
    assert find_pictures([folder / "b.png", folder / "a.jpg"]) == [folder / "b.png", folder / "a.jpg"]


def test_no_pictures(tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        find_pictures([tmp_path])
    with pytest.raises(UserError, match="there is no picture or folder"):
        find_pictures([tmp_path / "absent"])


def test_captions_from_text_files_metadata_or_the_prompt(folder):
    files = find_pictures([folder])
    (folder / "a.txt").write_text("\ufeff a red Robot\n", encoding="utf-8")
    lines = [{"file_name": "b.png", "text": "a blue owl"}, {"file_name": "a.jpg", "text": "not this"}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert find_captions(files) == ["a red Robot", "a blue owl"]
    assert find_captions(files, "one for all") == ["one for all"] * 2


def test_a_missing_empty_or_undecodable_caption(folder):
    files = find_pictures([folder / "b.png"])
    with pytest.raises(UserError, match="b.png has no caption; write it into b.txt"):
        find_captions(files)
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="the caption of .*b.png is empty"):
        find_captions(files)
    (folder / "b.txt").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(UserError, match="b.txt is not UTF-8"):
        find_captions(files)
    with pytest.raises(UserError, match="is empty"):
        find_captions(files, " ")


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"text": "x"}', '{"file_name": "b.png"}',
                                  '{"file_name": "b.png", "text": null}', '{"file_name": 3, "text": "x"}',
                                  '{"file_name": "b.png", "text": "\\ud800"}'])  # fmt: skip
def test_a_bad_line_of_metadata(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "good"}\n' + line)
    with pytest.raises(UserError, match="metadata.jsonl line 2"):
        find_captions([folder / "b.png"])


def test_encode(tiny, folder):
    pipe = Pipeline.from_folder(tiny, device="cpu")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a red star", "a blue robot on the left"]
    data = encode(pipe, images, captions, random_flip=True)
    text, mask = pipe.encode_prompt(captions)
    torch.testing.assert_close(data.latents, pipe.encode_images(images))
    torch.testing.assert_close(data.mirrored, pipe.encode_images(images.flip(3)))
    assert torch.equal(data.text, text) and torch.equal(data.text_mask, mask)
    assert len(data) == 2 and encode(pipe, images, captions).mirrored is None


# ---- what is skipped, cut or hostile ----------------------------------------------------------------------------


def test_one_line_about_the_pictures(folder, monkeypatch):
    """Every file beside the pictures is named with a reason, and the picture that the square cuts most."""
    monkeypatch.setattr(pictures, "formats", lambda: ["PNG", "JPEG"])
    Image.new("RGB", (160, 90), RED).save(folder / "wide.jfif", format="JPEG")
    (folder / "IMG.HEIC").write_bytes(b"")
    (folder / "more").mkdir()
    (folder / "a.txt").write_text("a red robot")
    files = find_pictures([folder])
    assert [file.name for file in files] == ["a.jpg", "b.png", "wide.jfif"]
    assert describe_pictures([folder], files) == (
        "3 pictures, skipped IMG.HEIC (needs pip install pillow-heif), skipped more (a folder), "
        "skipped notes.md (not a picture by its name), the middle square leaves out 44% of wide.jfif"
    )
    assert describe_pictures([files[0]], files[:1]) == "1 picture, a.jpg"
    with pytest.raises(UserError, match="IMG.HEIC cannot be read .*pip install pillow-heif"):
        open_picture(folder / "IMG.HEIC")


def test_formats_of_plug_ins_are_read_where_they_are_installed(monkeypatch):
    called = []
    for name in [name for name in ("HEIF", "JXL") if name in Image.OPEN]:
        monkeypatch.delitem(Image.OPEN, name)
    heif = types.SimpleNamespace(register_heif_opener=lambda: (called.append(1), Image.register_open("HEIF", None)))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # as if it were not installed
    assert "HEIF" in pictures.formats.__wrapped__() and "JXL" not in pictures.formats.__wrapped__()
    assert called == [1]
    Image.OPEN.pop("HEIF"), Image.ID.remove("HEIF")


@pytest.mark.skipif("AVIF" not in pictures.formats(), reason="this Pillow does not read AVIF")
def test_avif(tmp_path):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "new.avif", quality=100)
    assert np.abs(np.array(pixel(tmp_path / "new.avif")) - RED).max() < 10


def test_too_many_pixels_are_refused_in_our_words(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "big.png")
    for limit in (1000, 500):  # PIL warns above the limit, and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match=f"big.png has more than {limit:,} pixels; scale it down"):
                open_picture(tmp_path / "big.png")


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # PIL would
    with pytest.raises(UserError, match="cannot be read as a picture"):
        open_picture(tmp_path / "a.png")


def test_a_pipe_is_refused_and_not_waited_for(folder):
    for name in ("pipe.png", "b.txt"):
        os.mkfifo(folder / name)
    assert find_pictures([folder]) == [folder / "a.jpg", folder / "b.png"]
    assert "skipped pipe.png (not a file)" in describe_pictures([folder], [folder / "b.png"])
    with pytest.raises(UserError, match="there is no picture"):
        find_pictures([folder / "pipe.png"])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        open_picture(folder / "pipe.png")
    with pytest.raises(UserError, match="b.txt is not a file"):
        find_captions([folder / "b.png"])


def test_a_caption_with_a_large_suffix(folder):
    Image.new("RGB", (20, 20), RED).save(folder / "IMG.JPG")
    (folder / "IMG.TXT").write_text("a red robot")
    assert find_captions([folder / "IMG.JPG"]) == ["a red robot"]
