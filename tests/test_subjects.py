from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.tiny import subjects
from dit.tiny.scenes import BACKGROUNDS, SIZES, THINGS
from dit.tiny.subjects import (
    PICTURES,
    PROMPT_BACKGROUNDS,
    PROMPT_PLACES,
    SUBJECTS,
    draw_parts,
    sample_creature,
    subject_caption,
    write_subjects,
)

SHIPPED = Path(__file__).parent.parent / "lessons/data/subjects"
EVERY = [(name, i) for name in PICTURES for i in range(5)]


def shipped(name, i):
    """A picture as an array and its caption, from the files."""
    path = SHIPPED / name / f"{i + 1:02}.png"
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture), path.with_suffix(".txt").read_bytes().decode()


def background_of(text):
    """The background that a caption names."""
    words = text.split()
    return words[words.index("background") - 1]


def place_of(text):
    """Where a caption says the subject is: (x, y), each -1, 0 or 1 from the middle."""
    return ("right" in text) - ("left" in text), ("bottom" in text) - ("top" in text)


def test_the_shipped_folder_is_what_the_code_writes(tmp_path):
    write_subjects(tmp_path)
    ours, theirs = ({p.relative_to(f) for p in f.rglob("*.*")} for f in (tmp_path, SHIPPED))
    assert ours == theirs and len(ours) == 2 * len(EVERY) + 1
    for path in ours:
        if path.suffix == ".txt":
            assert (tmp_path / path).read_bytes() == (SHIPPED / path).read_bytes()
        else:
            pixels = (np.asarray(Image.open(folder / path)) for folder in (tmp_path, SHIPPED))
            np.testing.assert_array_equal(*pixels, err_msg=str(path))


def test_the_shipped_prompts(tmp_path, monkeypatch):
    """Every subject has its class, and 25 prompts that are its captions on other backgrounds, at every place."""
    monkeypatch.setattr(subjects, "PICTURES", {})
    write_subjects(tmp_path)
    text = (SHIPPED / "prompts_and_classes.txt").read_bytes()
    assert (tmp_path / "prompts_and_classes.txt").read_bytes() == text
    lines = text.decode().splitlines()
    assert all(f"{name},{name}" in lines for name in PICTURES)
    prompts = {line.split("'")[1].format("", "robot").replace("  ", " ") for line in lines if ".format(" in line}
    wanted = {subject_caption("robot", b, "large", p) for b in PROMPT_BACKGROUNDS for p in PROMPT_PLACES}
    assert prompts == wanted and len(wanted) == 25


@pytest.mark.parametrize("name, i", EVERY)
def test_caption_fits_the_picture(name, i):
    picture, text = shipped(name, i)
    rgb = BACKGROUNDS[background_of(text)]
    assert tuple(picture[0, 0]) == rgb
    rows, columns = np.nonzero((picture != rgb).any(-1))
    middle = np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / 2 / picture.shape[0]
    assert tuple(np.sign(np.round((middle - 0.5) / 0.1))) == place_of(text)
    assert name in text.split() and ("small" in text) == (PICTURES[name][i][1] == "small")


@pytest.mark.parametrize("name, i", EVERY)
def test_subject_is_inside_and_of_a_readable_size(name, i):
    picture, text = shipped(name, i)
    drawn = (picture != BACKGROUNDS[background_of(text)]).any(-1)
    assert drawn[1:-1, 1:-1].sum() == drawn.sum()
    rows, columns = np.nonzero(drawn)
    height, width = ((np.ptp(x) + 1) / 256 for x in (rows, columns))
    side = SIZES[PICTURES[name][i][1]] / 64
    assert 0.85 * side < height <= side and width <= side


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_a_subject_differ_in_background_place_and_size(name):
    assert [len(set(column)) for column in zip(*PICTURES[name])] == [5, 2, 5]


def test_no_two_pictures_are_alike_at_the_size_of_the_model():
    small = {}
    for name, i in EVERY:
        picture = Image.fromarray(shipped(name, i)[0]).reduce(4)
        small[name, i] = np.asarray(picture, dtype=float) / 255
    psnr = {(a, b): -10 * np.log10(np.mean((small[a] - small[b]) ** 2)) for a, b in combinations(small, 2)}
    nearest = max(psnr, key=psnr.get)
    assert psnr[nearest] < 18, f"{nearest}: {psnr[nearest]:.1f} dB"


def test_the_class_of_two_subjects_is_known_to_the_model():
    assert set(PICTURES) == set(SUBJECTS)
    assert set(SUBJECTS) & set(THINGS) == {"cat", "rocket"}


def test_captions_by_hand():
    assert subject_caption("robot", "blue", "large", "top left") == "a robot at the top left on a blue background"
    assert subject_caption("owl", "orange", "small", "centre") == "a small owl in the middle on an orange background"


def test_creatures():
    """The same from the same seed, another from another; inside their square, in colours that are colours."""
    drawn = []
    for seed in range(40):
        parts, again = (sample_creature(np.random.default_rng(seed)) for _ in range(2))
        first, second = (draw_parts(p, "white", "large", "centre", 64).tobytes() for p in (parts, again))
        assert first == second
        drawn.append(first)
        points = np.concatenate([polygon for polygons, _ in parts for polygon in polygons])
        assert np.abs(points).max() < 1.3
        assert np.ptp(np.concatenate(parts[0][0]), axis=0).min() > 1  # the body is large
        rgbs = [rgb for _, rgb in parts]
        assert all(type(c) is int and 0 <= c <= 255 for rgb in rgbs for c in rgb)
    assert len(set(drawn)) == 40
