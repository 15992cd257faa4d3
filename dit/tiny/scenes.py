"""The world of the tiny model: captioned 64×64 pictures of 200 things, and pictures to train its autoencoder.

A scene is one or two things (name, size, place) on a background (colour, pattern). About an eighth of the combinations
of thing and background colour, and of the pairs of things, never occur in training, to test whether the model composes
or memorises. Another 12 things never occur at all.

    scene = sample_scene(np.random.default_rng(0))
    caption(scene, rng)  ->  "a fox at the top left on a striped blue background"
    draw(scene)          ->  PIL image

The pictures of the things are Microsoft's Fluent emoji (flat, MIT licence, see NOTICE) at 96 pixels in sprites.png.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHEET, CELL = Path(__file__).with_name("sprites.png"), 96  # pixels; the things in the order of THINGS + UNSEEN

THINGS = tuple("""
accordion airplane alien ambulance anchor apple avocado axe backpack balloon banana baseball basketball bathtub
battery bear bed bee beetle bell bicycle blossom books boot box bread briefcase broccoli bucket bus butterfly
cactus cake calendar camel camera candle car carrot castle cat chair cheese cherries chick chicken church clock
cloud clover clown coconut cookie corn couch cow crab crocodile croissant crown cucumber cup cupcake dice dog
dolphin door doughnut dress duck egg eggplant elephant envelope factory fire fish flamingo fox fries frog garlic
gem ghost gift giraffe glasses gloves grapes guitar hamburger hammer hat heart hedgehog helicopter honey horse
hotdog hourglass house jeans jellyfish key kite kiwi koala ladder ladybug laptop leaf lemon lion lipstick lock
lollipop magnet mango monkey moon motorcycle mountain mouse mushroom newspaper octopus palette palm pancakes
panda parrot peach peacock pear pencil penguin pepper phone piano pig pineapple pizza planet popcorn pretzel
pumpkin rabbit rainbow ring rocket rose sailboat sandwich scarf scissors scooter shark shield ship shirt shorts
shrimp skateboard skull snowflake snowman spider star strawberry suitcase sun sunflower sunglasses swan taco
teapot telephone television tent tie tiger tomato toothbrush tractor train tree trophy trumpet tulip turtle
umbrella volcano watch watermelon whale window wolf wrench yarn zebra
""".split())  # fmt: skip
# Never trained on: new subjects to teach.
UNSEEN = tuple("owl snail unicorn lobster snake squid dragon seal goat skunk llama gorilla".split())
PLURALS = set("books cherries fries glasses gloves grapes jeans pancakes scissors shorts sunglasses".split())

BACKGROUNDS = {
    "red": (233, 134, 134), "green": (138, 202, 152), "blue": (142, 176, 234), "yellow": (252, 234, 158),
    "orange": (250, 190, 136), "purple": (194, 156, 220), "white": (228, 230, 233), "black": (72, 74, 82),
}  # fmt: skip
PATTERNS = ("plain", "striped", "checked")
SIZES = {"large": 36, "small": 24}  # the side of a thing, in pixels of 64
# Neighbouring places are 16 pixels apart, two patches of the transformer. So the patches cut a thing in the same way at
# every place, and what the model has learned at one place is right at the others.
OFFSET = 16
PLACES = {
    "centre": (0, 0), "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
    "top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    name: str
    size: str
    place: str

    @property
    def box(self):
        """Left, top, right, bottom in pixels of a picture of 64. Its empty rim may lie outside the picture."""
        side, (x, y) = SIZES[self.size], PLACES[self.place]
        left, top = (32 + OFFSET * way - side // 2 for way in (x, y))
        return left, top, left + side, top + side


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    pattern: str = "plain"


def is_withheld(*words):
    """True for about 12 % of the combinations of words: those that training never draws. Deterministic."""
    return zlib.crc32(" ".join(words).encode()) % 8 == 0


def withheld_parts(scene):
    """For each combination in a scene, whether it is withheld: (thing, background) of each thing, and the pair."""
    names = sorted(thing.name for thing in scene.things)
    return [is_withheld(name, scene.background) for name in names] + [is_withheld(*names)] * (len(names) > 1)


def sample_scene(rng, withheld=False, two_things=0.3):
    """A random scene; all (or none) of its combinations are withheld from training. `two_things` is a probability."""
    n = 2 if rng.random() < two_things else 1
    while True:
        names = rng.choice(THINGS, size=n, replace=False)
        sizes, places = rng.choice(list(SIZES), size=n), rng.choice(list(PLACES), size=n)
        things = tuple(Thing(*map(str, t)) for t in zip(names, sizes, places))
        scene = Scene(things, str(rng.choice(list(BACKGROUNDS))), str(rng.choice(PATTERNS, p=(0.5, 0.25, 0.25))))
        if all(part == withheld for part in withheld_parts(scene)) and not _overlap(things):
            return scene


def _overlap(things):
    """Whether the boxes of two things overlap by more than 4 pixels, their empty rims."""
    if len(things) < 2:
        return False
    a, b = (thing.box for thing in things)
    return all(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) > 4 for i in (0, 1))


# ---- captions ---------------------------------------------------------------------------------------------------

SENTENCES = (
    "{things} on {background}",
    "{background} with {things}",
    "a picture of {things} on {background}",
    "there is {things} on {background}",
)


def caption(scene, rng, say_place=None):
    """A random wording of the scene. By default, one in six does not name the places. If there are two things, their
    sizes may be left out too; a single thing without a size is large."""
    if say_place is None:
        say_place = rng.random() < 5 / 6
    say_size = len(scene.things) == 1 or rng.random() < 0.5
    things = " and ".join(_noun(t, say_place, say_size, rng) for t in scene.things)
    word = scene.background if scene.pattern == "plain" else f"{scene.pattern} {scene.background}"
    return str(rng.choice(SENTENCES)).format(things=things, background=f"{article(word)} {word} background")


def _noun(thing, say_place, say_size, rng):
    said = say_size and (thing.size == "small" or rng.random() < 0.2)
    words = f"{thing.size} {thing.name}" if said else thing.name
    noun = words if thing.name in PLURALS else f"{article(words)} {words}"
    return f"{noun} {where(thing.place, rng.choice(['at', 'in']))}" if say_place else noun


def where(place, preposition="at"):
    return "in the middle" if place == "centre" else f"{preposition} the {place}"


def article(words):
    return "an" if words[0] in "aeiou" and not words.startswith("un") else "a"


# ---- drawing ----------------------------------------------------------------------------------------------------


@cache
def sprite(name, side):
    """A thing as an RGBA picture of side × side pixels."""
    number = (THINGS + UNSEEN).index(name)
    y, x = (CELL * n for n in divmod(number, _sheet().width // CELL))
    cut = _sheet().crop((x, y, x + CELL, y + CELL)).convert("RGBa")  # premultiplied, or edges get fringes
    return cut.resize((side, side), Image.Resampling.BOX).convert("RGBA")


@cache
def _sheet():
    return Image.open(SHEET).convert("RGBA")


def draw(scene, size=64):
    """The scene as a PIL image, size × size (64, or a multiple of it)."""
    canvas, zoom = draw_background(scene.background, scene.pattern, size), size // 64
    for thing in scene.things:
        picture = sprite(thing.name, SIZES[thing.size] * zoom)
        canvas.paste(picture, (thing.box[0] * zoom, thing.box[1] * zoom), picture)
    return canvas


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


def natural_image(rng, size=64):
    """A "dead leaves" image: overlapping discs and boxes of all sizes, with edges and a power spectrum like those of
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
    # Add smooth lighting and fine grain, which flat leaves lack.
    grid = np.linspace(-1, 1, size)
    light = 1 + rng.uniform(-0.35, 0.35) * grid[:, None, None] + rng.uniform(-0.35, 0.35) * grid[None, :, None]
    coarse = Image.fromarray(rng.normal(0, 1, (size // 4, size // 4)).astype(np.float32))
    coarse = coarse.resize((size, size), Image.BICUBIC)
    fine = rng.normal(0, 1, (size, size, 1))
    texture = rng.uniform(0, 14) * np.asarray(coarse)[..., None] + rng.uniform(0, 6) * fine
    return Image.fromarray(np.clip(picture * light + texture, 0, 255).astype(np.uint8))
