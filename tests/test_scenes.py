"""Scenes: what is withheld stays out, captions say what is drawn, and every kind looks different."""

import numpy as np
import pytest

from dit.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    WORLDS,
    Scene,
    Thing,
    caption,
    draw,
    is_withheld,
    natural_image,
    outline,
    sample_scene,
)

FULL = WORLDS["full"]


def test_at_least_a_tenth_is_withheld():
    triples = [(k, c, b) for k in FULL.kinds for c in FULL.colours for b in FULL.colours if c != b]
    share = np.mean([is_withheld(*triple) for triple in triples])
    assert len(FULL.kinds) >= 12 and len(FULL.colours) >= 8
    assert 0.1 <= share <= 0.15, share
    small = [is_withheld(*t) for t in triples if t[0] in WORLDS["small"].kinds]
    assert np.mean(small) >= 0.1, np.mean(small)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("withheld", [False, True])
def test_sampled_scenes_keep_to_their_side(world, withheld):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(WORLDS[world], rng, withheld)
        assert all(is_withheld(t.kind, t.colour, scene.background) == withheld for t in scene.things)
        assert all(t.colour != scene.background for t in scene.things)
        assert len({t.place for t in scene.things}) == len(scene.things)


def test_captions_name_what_is_drawn_in_many_wordings():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(FULL, rng)
        text = caption(scene, rng, say_place=True)
        for thing in scene.things:
            assert f"{thing.colour} {thing.kind}" in text
            assert ("in the middle" if thing.place == "centre" else f"the {thing.place}") in text
        assert f"{scene.background} background" in text
    star = Scene((Thing("star", "red", "large", "top left"),), "orange")
    wordings = {caption(star, rng) for _ in range(200)}
    assert len(wordings) >= 8 and all("an orange background" in w for w in wordings)


def test_pictures_show_background_and_colour_where_the_scene_says():
    for place, (x, y) in PLACES.items():
        scene = Scene((Thing("circle", "blue", "small", place),), "yellow")
        pixels = np.asarray(draw(scene))
        assert pixels.shape == (64, 64, 3)
        assert tuple(pixels[int(y * 64), int(x * 64)]) == COLOURS["blue"]
        assert tuple(pixels[0, 0]) == BACKGROUNDS["yellow"]


def test_kinds_differ_and_stay_inside():
    pictures = {}
    for kind in FULL.kinds:
        assert all(np.abs(np.asarray(p)).max() <= 1.2 for p in outline(kind))
        pictures[kind] = np.asarray(draw(Scene((Thing(kind, "black", "large", "centre"),), "white")), dtype=float)
    for a in pictures:
        for b in pictures:
            assert a == b or np.mean((pictures[a] - pictures[b]) ** 2) > 200, (a, b)


def test_patterns_show():
    star = (Thing("star", "red", "small", "centre"),)
    plain, striped, checked = (np.asarray(draw(Scene(star, "blue", p))) for p in ("plain", "striped", "checked"))
    assert len({tuple(c) for c in plain[:, 0]}) == 1
    assert len({tuple(c) for c in striped[:, 0]}) == 2 and len({tuple(c) for c in striped[0]}) == 1
    assert len({tuple(c) for c in checked[0]}) == 2


def test_drawing_is_a_function_of_its_seed():
    def pictures(seed):
        rng = np.random.default_rng(seed)
        return [np.asarray(draw(sample_scene(FULL, rng), rng)) for _ in range(3)] + [np.asarray(natural_image(rng))]

    assert all(np.array_equal(a, b) for a, b in zip(pictures(1), pictures(1)))
    assert not all(np.array_equal(a, b) for a, b in zip(pictures(1), pictures(2)))
