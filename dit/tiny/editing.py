"""Edits, measured on the subjects that ship: did the edit happen, and is the subject still there?"""

import itertools
from pathlib import Path

import torch

from dit.data import load_images
from dit.pictures import square, to_tensor
from dit.tiny.judge import CLASSES
from dit.tiny.scenes import BACKGROUNDS, OFFSET, PLACES
from dit.tiny.subjects import PICTURES, PROMPT_PLACES, draw_subject, subject_caption


class SubjectPicture:
    """A shipped picture of a subject, and what is known of it: its place, its background, which pixels are its own."""

    def __init__(self, folder, name, number, side):
        self.name, self.file = name, Path(folder) / name / f"{number:02}.png"
        self.background, self.size, self.place = PICTURES[name][number - 1]
        self.caption = subject_caption(name, self.background, self.size, self.place)
        self.picture = load_images([self.file], side)[0]  # (3, side, side)
        # What is the same on two backgrounds is subject alone.
        white, black = (self.draw(background, self.place) for background in ("white", "black"))  # (3, side, side) each
        self.mask = (white - black).abs().amax(0) < 0.1  # (side, side)

    def draw(self, background, place):
        """What a perfect edit would show, (3, side, side)."""
        drawn = draw_subject(self.name, background, self.size, place)
        return to_tensor([square(drawn, self.picture.shape[1])])[0]

    def edits(self):
        """Every other background, and every other of five places: list of (prompt, background, place)."""
        scenes = [(other, self.place) for other in BACKGROUNDS if other != self.background]
        scenes += [(self.background, other) for other in PROMPT_PLACES if other != self.place]
        return [(subject_caption(self.name, scene[0], self.size, scene[1]), *scene) for scene in scenes]

    def kept(self, images, place, reach=3):
        """How much of the subject is left at a place: the correlation of its pixels with those there, 1 for all of it.

        images (B, 3, side, side) -> (B,). The best of all shifts by up to `reach` pixels counts.
        """
        subject = standardise(self.picture[:, self.mask].flatten())  # (3·pixels,)
        down, right = self.displacement(place)
        scores = []
        for shift in itertools.product(range(-reach, reach + 1), repeat=2):
            back = images.roll((shift[0] - down, shift[1] - right), (2, 3))  # (B, 3, side, side)
            scores.append(standardise(back[:, :, self.mask].flatten(1)) @ subject)  # (B, 3·pixels) -> (B,)
        return torch.stack(scores).amax(0)  # (shifts, B) -> (B,)

    def displacement(self, place):
        """How far away a place is, in pixels (down, right)."""
        step = OFFSET[self.size] * self.picture.shape[1] // 64
        (x, y), (new_x, new_y) = PLACES[self.place], PLACES[place]
        return step * (new_y - y), step * (new_x - x)


def standardise(x):
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


@torch.no_grad()
def follows(judge, images, background, place):
    """images (B, 3, 64, 64) -> (B,) bool: whether the judge sees this background, and the object at this place."""
    answers, wanted = judge(images), {"background": background, "place": place}
    seen = [answers[question].argmax(1) == CLASSES[question].index(word) for question, word in wanted.items()]
    return seen[0] & seen[1]
