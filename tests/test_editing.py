"""What measures an edit: is the subject still there, and does the judge see what was asked for?"""

import numpy as np
import pytest
import torch

from dit.cli import TINY
from dit.tiny.editing import SubjectPicture, follows
from dit.tiny.judge import load_judge
from dit.tiny.scenes import PLACES
from dit.tiny.subjects import PICTURES

SUBJECTS = TINY.parent.parent / "lessons" / "data" / "subjects"


@pytest.fixture(scope="module")
def subjects():
    return {name: SubjectPicture(SUBJECTS, name, 2, 64) for name in PICTURES}


def test_edits_are_all_other_backgrounds_and_places(subjects):
    prompts = [prompt for prompt, *_ in subjects["robot"].edits()]
    assert len(set(prompts)) == 7 + 4 and subjects["robot"].caption not in prompts
    assert "a robot at the top left on a green background" in prompts
    assert "a robot in the middle on a blue background" in prompts


def test_kept_is_a_correlation_of_the_subjects_pixels(subjects):
    robot = subjects["robot"]
    noisy = robot.picture + torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = np.corrcoef(robot.picture[:, robot.mask].flatten(), noisy[:, robot.mask].flatten())[0, 1]
    assert robot.kept(noisy[None], robot.place, reach=0).item() == pytest.approx(expected, abs=1e-5)
    assert robot.kept(2 * noisy[None] + 1, robot.place, reach=0).item() == pytest.approx(expected, abs=1e-5)
    shifted = robot.picture[None].roll((2, -3), (2, 3))
    assert robot.kept(shifted, robot.place).item() == pytest.approx(1, abs=1e-5)
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
        assert 600 < subject.mask.sum() < 1000  # of 4096
        purple = subject.draw("purple", subject.place)  # (3, 64, 64)
        assert (purple - subject.picture).abs()[:, subject.mask].amax() < 0.1
        rows, columns = subject.mask.nonzero().float().mean(0).tolist()
        x, y = PLACES[subject.place]
        assert abs(rows - 32 - 12 * y) < 5 and abs(columns - 32 - 12 * x) < 5


def test_the_judge_sees_where_a_subject_is_and_on_what(subjects):
    judge = load_judge(TINY / "judge")
    for name in ("owl", "cat"):
        subject = subjects[name]
        scenes = [scene for _, *scene in subject.edits()[::3]]  # three backgrounds and a place
        assert all(follows(judge, subject.draw(*scene)[None], *scene).item() for scene in scenes)
        assert not any(follows(judge, subject.picture[None], *scene).item() for scene in scenes)
