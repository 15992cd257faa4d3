"""What measures an edit: is the subject still there, and does the judge see what was asked for?"""

import numpy as np
import pytest
import torch

from dit.cli import TINY
from dit.pictures import to_tensor
from dit.tiny.editing import SubjectPicture, follows
from dit.tiny.judge import load_judge
from dit.tiny.scenes import OFFSET, PLACES, Scene, Thing, draw
from dit.tiny.subjects import PICTURES

SUBJECTS = TINY.parent.parent / "lessons" / "data" / "subjects"


@pytest.fixture(scope="module")
def subjects():
    return {name: SubjectPicture(SUBJECTS, name, 2, 64) for name in PICTURES}


def test_edits_change_one_thing(subjects):
    robot = subjects["robot"]
    prompts = {edit.prompt: edit.kind for edit in robot.edits()}
    assert robot.same.prompt == robot.caption and robot.caption not in prompts
    assert len(prompts) == 7 + 2 + 4 + 1 + 3
    assert prompts["a robot at the top left on a green background"] == "background"
    assert prompts["a robot at the top left on a striped blue background"] == "pattern"
    assert prompts["a robot in the middle on a blue background"] == "place"
    assert prompts["a small robot at the top left on a blue background"] == "size"
    second = "a robot at the top left and a small duck at the bottom right on a blue background"
    assert prompts[second] == "second thing"


def test_kept_is_a_correlation_of_the_subjects_pixels(subjects):
    robot = subjects["robot"]
    noisy = robot.picture + torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = robot.draw("white", robot.place)  # (3, 64, 64), by its mask the same robot as in the picture
    expected = np.corrcoef(drawn[:, robot.mask].flatten(), noisy[:, robot.mask].flatten())[0, 1]
    assert robot.kept(noisy[None], robot.place, reach=0).item() == pytest.approx(expected, abs=1e-5)
    assert robot.kept(2 * noisy[None] + 1, robot.place, reach=0).item() == pytest.approx(expected, abs=1e-5)
    shifted = robot.picture[None].roll((2, -3), (2, 3))
    assert robot.kept(shifted, robot.place).item() == pytest.approx(1, abs=1e-3)  # edges differ with the background
    assert robot.kept(shifted, robot.place, reach=2).item() < 0.9


def test_kept_knows_the_subject_wherever_it_was_moved_and_no_other(subjects):
    for name in ("robot", "snail"):
        subject = subjects[name]
        for scene in (("white", "centre"), ("green", "bottom right")):
            assert subject.kept(subject.draw(*scene)[None], scene[1]) > 0.9
        others = torch.stack([other.draw(subject.background, subject.place) for other in subjects.values()])
        assert (subject.kept(others, subject.place) > 0.5).tolist() == [other == name for other in subjects]


def test_the_mask_is_subject_alone(subjects):
    for subject in subjects.values():
        assert 400 < subject.mask.sum() < 700  # of 4096
        purple = subject.draw("purple", subject.place)  # (3, 64, 64)
        assert (purple - subject.picture).abs()[:, subject.mask].amax() < 0.1
        rows, columns = subject.mask.nonzero().float().mean(0).tolist()
        x, y = PLACES[subject.place]
        assert abs(rows - 32 - OFFSET * y) < 5 and abs(columns - 32 - OFFSET * x) < 5


def test_kept_knows_the_subject_in_another_size(subjects):
    snail = subjects["snail"]
    small = snail.draw("white", "centre", "small")[None]  # (1, 3, 64, 64)
    assert snail.kept(small, "centre", "small") > 0.99 > 0.6 > snail.kept(small, "centre")


def test_the_judge_sees_where_a_subject_is_and_on_what(subjects):
    judge = load_judge(TINY / "judge")
    for name in ("owl", "cat"):
        subject = subjects[name]
        edits = [edit for edit in subject.edits() if edit.kind in ("background", "place")][::3]
        drawn = [subject.draw(edit.background, edit.place)[None] for edit in edits]
        assert all(follows(judge, image, edit).item() for image, edit in zip(drawn, edits))
        assert not any(follows(judge, subject.picture[None], edit).item() for edit in edits)


def test_a_second_thing_must_be_there_and_at_its_place(subjects):
    judge = load_judge(TINY / "judge")
    duck = next(edit for edit in subjects["robot"].edits() if edit.second == "duck")
    two = [Thing("fox", "large", "top left"), Thing("duck", "small", "bottom right")]
    elsewhere = [two[0], Thing("duck", "small", "bottom left")]
    other = [two[0], Thing("car", "small", "bottom right")]
    images = to_tensor([draw(Scene(tuple(things), "blue")) for things in (two, elsewhere, other, two[:1])])
    assert follows(judge, images, duck).tolist() == [True, False, False, False]
