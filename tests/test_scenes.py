"""Scenes: what is withheld stays out, captions say what is drawn, and every thing looks different."""

import numpy as np
import pytest

from dit.tiny.scenes import (
    BACKGROUNDS,
    PATTERNS,
    PLACES,
    SIZES,
    THINGS,
    UNSEEN,
    Scene,
    Thing,
    _overlap,
    caption,
    draw,
    is_withheld,
    natural_image,
    sample_scene,
    sprite,
    withheld_parts,
)


def test_about_an_eighth_is_withheld():
    share = np.mean([is_withheld(thing, background) for thing in THINGS for background in BACKGROUNDS])
    assert 0.1 <= share <= 0.15, share
    pairs = np.mean([is_withheld(*sorted((a, b))) for a in THINGS for b in THINGS if a < b])
    assert 0.1 <= pairs <= 0.15, pairs


def test_every_name_is_one_word_and_names_one_thing():
    assert len(set(THINGS)) == len(THINGS) == 200 and not set(THINGS) & set(UNSEEN)
    assert all(name.isalpha() and name.islower() for name in THINGS + UNSEEN)


@pytest.mark.parametrize("withheld", [False, True])
def test_sampled_scenes_keep_to_their_side(withheld):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, withheld) for _ in range(300)]
    assert {part for scene in scenes for part in withheld_parts(scene)} == {withheld}
    for scene in scenes:
        assert not {t.name for t in scene.things} & set(UNSEEN)
        assert not _overlap(scene.things)
    assert 0.2 < np.mean([len(scene.things) == 2 for scene in scenes]) < 0.4
    assert all(len(sample_scene(rng, withheld, two_things=1.0).things) == 2 for _ in range(20))


def test_captions_name_what_is_drawn_in_many_wordings():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng)
        text = caption(scene, rng, say_place=True)
        for thing in scene.things:
            assert thing.name in text
            assert ("in the middle" if thing.place == "centre" else f"the {thing.place}") in text
        assert f"{scene.background} background" in text
        assert (scene.pattern in text) == (scene.pattern != "plain")
        assert len(scene.things) == 2 or ("small" in text) == (scene.things[0].size == "small")
    fox = Scene((Thing("fox", "large", "top left"),), "orange")
    wordings = {caption(fox, rng) for _ in range(300)}
    assert len(wordings) >= 12 and all("an orange background" in w for w in wordings)
    jeans = Scene((Thing("jeans", "large", "top left"),), "orange", "striped")
    assert {caption(jeans, rng, say_place=False) for _ in range(100)} >= {"jeans on a striped orange background"}


def test_pictures_show_things_where_the_scene_says():
    for size in SIZES:
        for place, (x, y) in PLACES.items():
            thing = Thing("basketball", size, place)
            pixels = np.asarray(draw(Scene((thing,), "yellow")))
            assert pixels.shape == (64, 64, 3)
            rows, columns = np.nonzero((pixels != BACKGROUNDS["yellow"]).any(-1))
            left, top, right, bottom = thing.box
            assert left <= columns.min() and columns.max() < right and top <= rows.min() and rows.max() < bottom
            assert np.ptp(rows) > 0.7 * SIZES[size]
            middle = np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / 2 - 31.5
            assert tuple(np.sign(np.round(middle / 5))) == (x, y)


@pytest.mark.parametrize("size", SIZES)
def test_patches_cut_a_thing_alike_at_every_place(size):
    patch = 2 * 4  # pixels: 2 latents of 4 pixels
    assert len({tuple(edge % patch for edge in Thing("fox", size, place).box) for place in PLACES}) == 1


def test_a_larger_picture_is_the_same_scene():
    scene = Scene((Thing("fox", "large", "top left"), Thing("pizza", "small", "bottom right")), "blue", "checked")
    small, large = np.asarray(draw(scene), float), np.asarray(draw(scene, 256).reduce(4), float)
    assert np.abs(small - large).mean() < 2


def test_things_differ():
    pictures = np.stack([np.asarray(sprite(name, 24), float) for name in THINGS + UNSEEN])  # (212, 24, 24, 4)
    opaque = pictures[..., :3] * pictures[..., 3:] / 255
    distance = [np.mean((opaque[i] - opaque[:i]) ** 2, axis=(1, 2, 3)).min() for i in range(1, len(opaque))]
    assert min(distance) > 200
    assert (pictures[..., 3].mean(axis=(1, 2)) > 30).all()  # none is empty


def test_patterns_show():
    star = (Thing("star", "small", "centre"),)
    plain, striped, checked = (np.asarray(draw(Scene(star, "blue", p))) for p in PATTERNS)
    assert len({tuple(c) for c in plain[:, 0]}) == 1
    assert len({tuple(c) for c in striped[:, 0]}) == 2 and len({tuple(c) for c in striped[0]}) == 1
    assert len({tuple(c) for c in checked[0]}) == 2


def test_drawing_is_a_function_of_its_seed():
    def pictures(seed):
        rng = np.random.default_rng(seed)
        return [np.asarray(draw(sample_scene(rng))) for _ in range(3)] + [np.asarray(natural_image(rng))]

    assert all(np.array_equal(a, b) for a, b in zip(pictures(1), pictures(1)))
    assert not all(np.array_equal(a, b) for a, b in zip(pictures(1), pictures(2)))
