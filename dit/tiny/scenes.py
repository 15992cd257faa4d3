"""The world of the tiny model: captioned 64×64 pictures of simple objects, and pictures to train its autoencoder.

A scene is one or two objects (kind, colour, size, place) on a background (colour, pattern). Some combinations of
(kind, colour, background) never occur in training, so that one can ask whether the model composes or remembers.

    scene = sample_scene(WORLDS["small"], np.random.default_rng(0))
    caption(scene, rng)  ->  "a red star at the top left of a blue background"
    draw(scene, rng)     ->  PIL image
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 4

# Object colours, and the softer shade that the same word means as a background.
COLOURS = {
    "red": (214, 40, 40), "green": (34, 150, 70), "blue": (38, 84, 196), "yellow": (250, 204, 40),
    "orange": (243, 124, 26), "purple": (132, 58, 176), "white": (248, 248, 248), "black": (28, 28, 32),
}  # fmt: skip
BACKGROUNDS = {
    "red": (233, 134, 134), "green": (138, 202, 152), "blue": (142, 176, 234), "yellow": (252, 234, 158),
    "orange": (250, 190, 136), "purple": (194, 156, 220), "white": (228, 230, 233), "black": (72, 74, 82),
}  # fmt: skip

# Centre of each place, in units of the picture; x to the right, y down.
PLACES = {
    "centre": (0.5, 0.5), "top left": (0.28, 0.28), "top right": (0.72, 0.28), "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72), "top": (0.5, 0.26), "bottom": (0.5, 0.74), "left": (0.26, 0.5), "right": (0.74, 0.5),
}  # fmt: skip
RADIUS = {"large": 0.225, "small": 0.14}  # of an object, in units of the picture


@dataclass(frozen=True)
class World:
    """What may be drawn. Every combination occurs but object and background never share a colour."""

    kinds: tuple[str, ...]
    places: tuple[str, ...]
    sizes: tuple[str, ...] = ("large",)
    patterns: tuple[str, ...] = ("plain",)
    colours: tuple[str, ...] = tuple(COLOURS)
    two_objects: float = 0.0  # share of scenes with a second object


WORLDS = {
    "small": World(
        kinds=("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon"),
        places=("centre", "top left", "top right", "bottom left", "bottom right"),
    ),
    "full": World(
        kinds=("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon",
               "diamond", "arrow", "flower", "house"),
        places=tuple(PLACES),
        sizes=("large", "small"),
        patterns=("plain", "striped", "checked"),
        two_objects=0.3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    pattern: str = "plain"


def is_withheld(kind, colour, background):
    """True for the (about 12 % of) combinations that are never drawn for training; the same on every machine."""
    return zlib.crc32(f"{kind} {colour} {background}".encode()) % 8 == 0


def sample_scene(world, rng, withheld=False):
    """A random scene in which every object's (kind, colour, background) is withheld from training, or none is."""
    n_things = 2 if rng.random() < world.two_objects else 1
    background, pattern = rng.choice(world.colours), rng.choice(world.patterns)
    while True:
        places = rng.choice(world.places, size=n_things, replace=False)
        kinds, sizes = rng.choice(world.kinds, size=n_things), rng.choice(world.sizes, size=n_things)
        colours = rng.choice([c for c in world.colours if c != background], size=n_things, replace=False)
        things = tuple(Thing(*map(str, t)) for t in zip(kinds, colours, sizes, places))
        if all(is_withheld(t.kind, t.colour, background) == withheld for t in things) and not _overlap(things):
            return Scene(things, str(background), str(pattern))


def _overlap(things):
    if len(things) < 2:
        return False
    (a, b), distance = things, math.dist(PLACES[things[0].place], PLACES[things[1].place])
    return distance < RADIUS[a.size] + RADIUS[b.size]


# ---- captions ---------------------------------------------------------------------------------------------------

ARTICLE = {"orange": "an"}
SENTENCES = (
    "{things} on {background}",
    "{background} with {things}",
    "a picture of {things} on {background}",
    "there is {things} on {background}",
)


def caption(scene, rng, say_place=None):
    """One of many wordings of the scene. One in six leaves the place of a single object unsaid, unless told."""
    if say_place is None:
        say_place = len(scene.things) > 1 or rng.random() < 5 / 6
    things = " and ".join(_noun(t, say_place, rng) for t in scene.things)
    pattern = "" if scene.pattern == "plain" else scene.pattern + " "
    word = pattern + scene.background
    background = f"{ARTICLE.get(word, 'a')} {word} background"
    return str(rng.choice(SENTENCES)).format(things=things, background=background)


def _noun(thing, say_place, rng):
    words = f"{thing.colour} {thing.kind}"
    words = words if thing.size == "large" else f"{thing.size} {words}"
    noun = f"{ARTICLE.get(words.split()[0], 'a')} {words}"
    if not say_place:
        return noun
    place = "in the middle" if thing.place == "centre" else f"{rng.choice(['at', 'in'])} the {thing.place}"
    return f"{noun} {place}"


# ---- drawing ----------------------------------------------------------------------------------------------------


def draw(scene, rng=None, size=64):
    """The scene as a PIL image, size × size. With `rng`, objects are shifted, turned and scaled a little."""
    canvas = draw_background(scene.background, scene.pattern, size * SUPERSAMPLE)
    for thing in scene.things:
        shift, turn, scale = (0, 0), 0.0, 1.0
        if rng is not None:
            shift, turn, scale = rng.uniform(-0.025, 0.025, 2), rng.uniform(-0.12, 0.12), rng.uniform(0.94, 1.06)
        centre = np.add(PLACES[thing.place], shift)
        paint(canvas, outline(thing.kind), COLOURS[thing.colour], centre, RADIUS[thing.size] * scale, turn)
    return canvas.reduce(SUPERSAMPLE)


def draw_background(colour, pattern, size):
    rgb = BACKGROUNDS[colour]
    canvas = Image.new("RGB", (size, size), rgb)
    pen, darker, cell = ImageDraw.Draw(canvas), tuple(int(c * 0.88) for c in rgb), size // 8
    for row in range(8):
        for column in range(8):
            if (pattern == "striped" and row % 2) or (pattern == "checked" and (row + column) % 2):
                x, y = column * cell, row * cell
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=darker)
    return canvas


def paint(canvas, polygons, rgb, centre, radius, turn=0.0):
    """Fill the first polygon, cut out the others, and draw the rim in a darker shade. Polygons live in [-1, 1]²."""
    side = canvas.size[0]
    cos, sin = math.cos(turn), math.sin(turn)
    turned = [np.asarray(p) @ [[cos, sin], [-sin, cos]] * radius * side + np.multiply(centre, side) for p in polygons]
    mask = Image.new("L", canvas.size)
    for i, polygon in enumerate(turned):
        ImageDraw.Draw(mask).polygon([tuple(p) for p in polygon], fill=0 if i else 255)
    canvas.paste(rgb, mask=mask)
    rim = tuple(int(c * 0.7) for c in rgb)
    for polygon in turned:
        closed = [tuple(p) for p in (*polygon, *polygon[:2])]
        ImageDraw.Draw(canvas).line(closed, fill=rim, width=max(1, side // 64), joint="curve")


def outline(kind):
    """Polygons of a kind of object, about inside the unit circle; the second and later ones are holes."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.sin(angles), -np.cos(angles)], 1)
    if kind == "circle":
        return [circle * 0.95]
    if kind == "ring":
        return [circle, circle * 0.5]
    if kind == "square":
        return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85]
    if kind == "diamond":
        return [[(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)]]
    if kind == "triangle":
        return [[(0, -1.0), (1.05, 0.85), (-1.05, 0.85)]]
    if kind == "star":
        corners = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
        return [[(x * r, y * r) for (x, y), r in zip(corners, [1.12, 0.46] * 5)]]
    if kind == "heart":
        x = 16 * np.sin(angles) ** 3
        y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
        return [np.stack([x, -y - 2], 1) / 16]
    if kind == "cross":
        a, b = 1.0, 0.36
        return [[(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                 (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]]  # fmt: skip
    if kind == "moon":
        outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.28 * np.pi, 1.72 * np.pi, 32)]
        inner = [(0.42 + 0.8 * math.cos(t), 0.93 * math.sin(t)) for t in np.linspace(1.66 * np.pi, 0.34 * np.pi, 32)]
        return [np.add(outer + inner, (0.15, 0))]
    if kind == "arrow":
        return [[(1.1, 0), (0.15, -0.95), (0.15, -0.38), (-1.05, -0.38), (-1.05, 0.38), (0.15, 0.38), (0.15, 0.95)]]
    if kind == "flower":
        return [circle * (0.75 + 0.3 * np.cos(5 * angles))[:, None], circle * 0.25]
    if kind == "house":
        return [[(0, -1.1), (1.05, -0.2), (0.8, -0.2), (0.8, 0.95), (-0.8, 0.95), (-0.8, -0.2), (-1.05, -0.2)],
                [(-0.25, 0.95), (-0.25, 0.3), (0.25, 0.3), (0.25, 0.95)]]  # fmt: skip
    raise ValueError(f"unknown kind {kind!r}")


def natural_image(rng, size=64):
    """Dead leaves: overlapping shaded discs and boxes of all sizes, whose edges and power spectrum resemble those of
    photographs (Lee, Mumford & Huang, 2001). It teaches the autoencoder pictures that are not scenes."""
    side = size * 2
    canvas = Image.new("RGB", (side, side), tuple(int(c) for c in rng.integers(0, 256, 3)))
    base = rng.uniform(60, 200) + rng.normal(0, 25, 3)
    for _ in range(rng.integers(20, 120)):
        radius = min(side * 0.5, 3.0 * rng.random() ** -0.7)
        x, y = rng.uniform(0, side, 2)
        rgb = tuple(int(c) for c in np.clip(base + rng.normal(0, 50) + rng.normal(0, 25, 3), 0, 255))
        ratio = rng.uniform(0.5, 1.5)
        box = (x - radius, y - radius * ratio, x + radius, y + radius * ratio)
        pen = ImageDraw.Draw(canvas)
        pen.ellipse(box, fill=rgb) if rng.random() < 0.7 else pen.rectangle(box, fill=rgb)
    picture = np.asarray(canvas.reduce(2), dtype=np.float32)
    # A smooth light and a fine grain: large gradients and texture, which flat leaves lack.
    grid = np.linspace(-1, 1, size)
    light = 1 + rng.uniform(-0.35, 0.35) * grid[:, None, None] + rng.uniform(-0.35, 0.35) * grid[None, :, None]
    coarse = Image.fromarray(rng.normal(0, 1, (size // 4, size // 4)).astype(np.float32))
    coarse = coarse.resize((size, size), Image.BICUBIC)
    fine = rng.normal(0, 1, (size, size, 1))
    texture = rng.uniform(0, 14) * np.asarray(coarse)[..., None] + rng.uniform(0, 6) * fine
    return Image.fromarray(np.clip(picture * light + texture, 0, 255).astype(np.uint8))
