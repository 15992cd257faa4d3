"""Measure edits of the five subjects: did the edit happen, and is the subject still there?"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dit.data import load_images
from dit.pictures import square, to_tensor
from dit.tiny.judge import CLASSES
from dit.tiny.scenes import BACKGROUNDS, PATTERNS, PLACES, SENTENCES, article, where
from dit.tiny.subjects import PICTURES, PROMPT_PLACES, draw_subject, subject_caption

SECOND = ("strawberry", "duck", "star")  # things that the model knows


@dataclass(frozen=True)
class Edit:
    """What a picture of a subject should show; `kind` names what is changed, "same" if nothing."""

    kind: str
    subject: str
    background: str
    pattern: str
    size: str
    place: str
    second: str | None = None  # a small thing at the opposite place

    @property
    def opposite(self):
        x, y = PLACES[self.place]
        return next(name for name, place in PLACES.items() if place == (-x, -y))

    @property
    def prompt(self):
        words = self.subject if self.size == "large" else f"{self.size} {self.subject}"
        things = f"{article(words)} {words} {where(self.place)}"
        if self.second:
            things += f" and a small {self.second} {where(self.opposite)}"
        word = self.background if self.pattern == "plain" else f"{self.pattern} {self.background}"
        return SENTENCES[0].format(things=things, background=f"{article(word)} {word} background")


class SubjectPicture:
    """One of the five pictures of a subject, with its background, size, place and the pixels of the subject."""

    def __init__(self, folder, name, number, side):
        self.name, self.file = name, Path(folder) / name / f"{number:02}.png"
        self.background, self.size, self.place = PICTURES[name][number - 1]
        self.caption = subject_caption(name, self.background, self.size, self.place)
        self.same = Edit("same", name, self.background, "plain", self.size, self.place)
        self.picture = load_images([self.file], side)[0]  # (3, side, side)
        self.mask = self.mask_of(self.place, self.size)  # (side, side)

    def draw(self, background, place, size=None):
        """What a perfect edit would show on a plain background, (3, side, side)."""
        drawn = draw_subject(self.name, background, size or self.size, place)
        return to_tensor([square(drawn, self.picture.shape[1])])[0]

    def mask_of(self, place, size):
        """(side, side), True at pixels of the subject: those that are equal on a white and a black background."""
        white, black = (self.draw(background, place, size) for background in ("white", "black"))
        return (white - black).abs().amax(0) < 0.1

    def edits(self):
        """Other backgrounds, patterns and places, the other size, and a second thing where there is room."""
        changes = [("background", {"background": other}) for other in BACKGROUNDS if other != self.background]
        changes += [("pattern", {"pattern": pattern}) for pattern in PATTERNS[1:]]
        changes += [("place", {"place": other}) for other in PROMPT_PLACES if other != self.place]
        changes += [("size", {"size": "small" if self.size == "large" else "large"})]
        if self.place != "centre":
            changes += [("second thing", {"second": thing}) for thing in SECOND]
        return [replace(self.same, kind=kind, **change) for kind, change in changes]

    def kept(self, images, place, size=None, reach=3):
        """How much of the subject is left: the correlation between the pictures and the true subject, over its pixels.

        images (B, 3, side, side) -> (B,), at most 1. It is the maximum over shifts of up to `reach` pixels.
        """
        mask = self.mask_of(place, size or self.size)  # (side, side)
        subject = standardise(self.draw("white", place, size)[:, mask].flatten())  # (3·pixels,)
        scores = []
        for shift in itertools.product(range(-reach, reach + 1), repeat=2):
            shifted = images.roll(shift, (2, 3))  # (B, 3, side, side)
            scores.append(standardise(shifted[:, :, mask].flatten(1)) @ subject)  # (B, 3·pixels) -> (B,)
        return torch.stack(scores).amax(0)  # (shifts, B) -> (B,)


def standardise(x):
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


@torch.no_grad()
def follows(judge, images, edit):
    """images (B, 3, 64, 64) -> (B,) bool: whether the judge sees the edit's background, pattern, places and thing.

    The judge does not know the subject itself. A second thing must be one of the two most likely things.
    """
    answers = judge(images)
    places = {edit.place, edit.opposite} if edit.second else {edit.place}
    wanted = {"background": {edit.background}, "pattern": {edit.pattern}, "place": places}
    seen = torch.ones(len(images), dtype=torch.bool)
    for question, words in wanted.items():
        best = answers[question].topk(len(words)).indices.sort(dim=1).values  # (B, words)
        seen &= (best == torch.tensor(sorted(map(CLASSES[question].index, words)))).all(dim=1)
    if edit.second:
        best = answers["thing"].topk(2).indices  # (B, 2)
        seen &= (best == CLASSES["thing"].index(edit.second)).any(dim=1)
    return seen
