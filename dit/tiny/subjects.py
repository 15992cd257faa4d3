"""Five characters that the tiny model has never seen, to fine-tune it on: robot, owl, cat, rocket and snail.

It knows the words cat and rocket, and draws other cats and rockets. Robot, owl and snail are new words to it.
A character is a list of parts, painted from back to front. A part is (polygons, rgb) in [-1, 1]²: the first polygon is
filled, the others are holes. Each character has five pictures that differ in background, place and size.

    draw_subject("owl", "blue", "large", "top left")     ->  PIL image, 256 × 256
    subject_caption("owl", "blue", "large", "top left")  ->  "an owl at the top left on a blue background"
    python -m dit.tiny.subjects --out lessons/data/subjects  ->  robot/01.png, robot/01.txt, … snail/05.txt
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dit.tiny.scenes import BACKGROUNDS, OFFSET, PLACES, SENTENCES, SIZES, article, draw_background, where
from sparsecode.common import replacing

# ---- polygons -----------------------------------------------------------------------------------------

ANGLES = np.linspace(0, 2 * np.pi, 48, endpoint=False)
CIRCLE = np.stack([np.sin(ANGLES), -np.cos(ANGLES)], 1)  # of radius 1


def oval(x, y, rx, ry=None):
    return CIRCLE * (rx, ry or rx) + (x, y)


def box(x, y, rx, ry):
    """A rectangle with round corners, as a polygon."""
    return np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.35 * (rx, ry) + (x, y)


def heart(x, y, r):
    across = 16 * np.sin(ANGLES) ** 3
    up = 13 * np.cos(ANGLES) - 5 * np.cos(2 * ANGLES) - 2 * np.cos(3 * ANGLES) - np.cos(4 * ANGLES)
    return np.stack([across, -up - 2], 1) / 16 * r + (x, y)


def arc(x, y, r, start, end, grow=0.0):
    """Points on a circle between two angles (in turns, clockwise from the right); with `grow`, on a spiral."""
    t = np.linspace(start, end, 48)
    r = r + grow * (t - start)
    return np.stack([x + r * np.cos(2 * np.pi * t), y + r * np.sin(2 * np.pi * t)], 1)


def stroke(points, width):
    """A line through the points, as a polygon of that width (one number, or one for each point)."""
    points = np.asarray(points, float)
    along = np.gradient(points, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = along[:, ::-1] * (-1, 1) * np.reshape(width, (-1, 1)) / 2
    return np.concatenate([points + across, (points - across)[::-1]])


def between(polygon, top, bottom):
    """The slice of a convex polygon between two heights."""
    return polygon[(polygon[:, 1] > top) & (polygon[:, 1] < bottom)]


def pair(polygons, rgb):
    """A part and its mirror image."""
    return [(polygons, rgb), ([np.multiply(p, (-1, 1)) for p in polygons], rgb)]


# ---- characters ---------------------------------------------------------------------------------------

INK, WHITE, CREAM = (30, 30, 40), (250, 250, 250), (250, 226, 180)
RED, ORANGE, YELLOW, PINK = (220, 44, 48), (245, 130, 30), (255, 210, 50), (245, 140, 165)
TEAL, NAVY, BROWN, BARK, COAL = (40, 176, 176), (30, 44, 84), (150, 92, 50), (108, 62, 34), (66, 66, 84)
BLUE, SKY, LEAF, MINT = (44, 92, 200), (140, 205, 245), (150, 205, 60), (120, 220, 90)
MAGENTA, ROSE = (205, 45, 125), (250, 170, 200)

HULL = between(oval(0, -0.1, 0.52, 0.9), -2, 0.62)
TAIL = np.linspace((-0.97, 0.9), (0.2, 0.78), 24)
SLUG = np.concatenate([TAIL, arc(0.3, 0.4, 0.38, 0.25, 0), [(0.68, 0.0)]])  # the middle line of the snail

SUBJECTS = {
    "robot": [
        ([stroke([(0, -0.6), (0, -0.85)], 0.12)], COAL),
        ([oval(0, -0.84, 0.15)], RED),
        *pair([stroke([(0.4, 0.3), (0.78, 0.55)], 0.2)], COAL),
        *pair([oval(0.78, 0.55, 0.17)], ORANGE),
        *pair([box(0.27, 0.85, 0.21, 0.14)], ORANGE),
        *pair([box(0.78, -0.28, 0.18, 0.2)], ORANGE),
        ([box(0, 0.44, 0.52, 0.38)], TEAL),
        ([heart(0, 0.47, 0.22)], RED),
        ([box(0, -0.28, 0.76, 0.44)], TEAL),
        ([box(0, -0.28, 0.6, 0.31)], NAVY),
        *pair([oval(0.3, -0.34, 0.17)], YELLOW),
        ([stroke(arc(0, -0.25, 0.17, 0.08, 0.42), 0.09)], WHITE),
    ],
    "owl": [
        *pair([oval(0.28, 0.9, 0.2, 0.1)], ORANGE),
        *pair([[(0.2, -0.7), (0.74, -1), (0.76, -0.3)]], BROWN),
        ([oval(0, 0.08, 0.8, 0.86)], BROWN),
        ([oval(0, 0.42, 0.5, 0.48)], CREAM),
        *pair([oval(0.72, 0.3, 0.2, 0.5)], BARK),
        *pair([oval(0.36, -0.28, 0.4)], WHITE),
        *pair([oval(0.33, -0.28, 0.26)], INK),
        *pair([oval(0.26, -0.37, 0.1)], WHITE),
        ([[(-0.16, -0.12), (0.16, -0.12), (0, 0.2)]], ORANGE),
    ],
    "cat": [
        ([stroke(arc(0.5, 0.36, 0.38, 0.3, -0.35), 0.22)], COAL),
        ([oval(0, 0.5, 0.5, 0.48)], COAL),
        ([oval(0, 0.5, 0.24, 0.34)], WHITE),
        *pair([oval(0.24, 0.88, 0.2, 0.11)], WHITE),
        *pair([[(0.1, -0.6), (0.6, -1), (0.74, -0.2)]], COAL),
        *pair([[(0.34, -0.64), (0.57, -0.82), (0.62, -0.5)]], PINK),
        ([oval(0, -0.26, 0.78, 0.5)], COAL),
        ([oval(0, -0.02, 0.34, 0.22)], WHITE),
        *pair([oval(0.36, -0.34, 0.23)], MINT),
        *pair([oval(0.36, -0.34, 0.12, 0.19)], INK),
        *pair([oval(0.33, -0.41, 0.07)], WHITE),
        ([[(-0.11, -0.12), (0.11, -0.12), (0, 0.02)]], PINK),
        ([oval(0, 0.3, 0.12)], YELLOW),
    ],
    "rocket": [
        ([[(-0.34, 0.6), (0.34, 0.6), (0.22, 0.84), (0, 1), (-0.22, 0.84)]], ORANGE),
        ([[(-0.2, 0.6), (0.2, 0.6), (0, 0.88)]], YELLOW),
        *pair([[(0.4, 0.0), (0.78, 0.42), (0.8, 0.86), (0.3, 0.56)]], RED),
        ([HULL], WHITE),
        ([between(HULL, -2, -0.5)], RED),
        ([between(HULL, 0.42, 2)], BLUE),
        ([oval(0, -0.04, 0.42)], SKY),
        *pair([oval(0.18, -0.13, 0.08, 0.11)], INK),
        ([stroke(arc(0, 0.02, 0.16, 0.06, 0.44), 0.04)], INK),
    ],
    "snail": [
        ([stroke([(0.62, -0.2), (0.4, -0.75)], 0.13)], LEAF),
        ([stroke([(0.66, -0.2), (0.82, -0.7)], 0.13)], LEAF),
        ([stroke(SLUG, 0.44 * np.linspace(0, 1, len(SLUG)) ** 0.3)], LEAF),
        ([oval(0.64, -0.08, 0.34, 0.3)], LEAF),
        *[([oval(x, y, 0.22)], WHITE) for x, y in [(0.36, -0.74), (0.77, -0.7)]],
        *[([oval(x, y, 0.11)], INK) for x, y in [(0.41, -0.72), (0.82, -0.68)]],
        ([stroke(arc(0.7, -0.08, 0.15, 0.06, 0.44), 0.05)], INK),
        ([oval(-0.3, 0.1, 0.64)], MAGENTA),
        ([stroke(arc(-0.3, 0.1, 0.06, 0, 1.75, grow=0.24), 0.14)], ROSE),
    ],
}

# The five pictures of each: background, size, place. The first is a large portrait in the middle.
PICTURES = {
    "robot": [
        ("orange", "large", "centre"),
        ("blue", "large", "top left"),
        ("purple", "large", "bottom right"),
        ("white", "small", "top right"),
        ("red", "large", "bottom"),
    ],
    "owl": [
        ("blue", "large", "centre"),
        ("green", "large", "top right"),
        ("yellow", "large", "left"),
        ("purple", "small", "top left"),
        ("white", "large", "bottom right"),
    ],
    "cat": [
        ("green", "large", "centre"),
        ("yellow", "large", "bottom right"),
        ("orange", "large", "top"),
        ("blue", "small", "bottom left"),
        ("red", "large", "top right"),
    ],
    "rocket": [
        ("black", "large", "centre"),
        ("blue", "large", "right"),
        ("green", "large", "bottom left"),
        ("yellow", "small", "top left"),
        ("orange", "large", "top right"),
    ],
    "snail": [
        ("yellow", "large", "centre"),
        ("purple", "large", "bottom left"),
        ("blue", "large", "top"),
        ("black", "small", "bottom right"),
        ("orange", "large", "top right"),
    ],
}
PROMPT_BACKGROUNDS = ("red", "green", "blue", "yellow", "purple")
PROMPT_PLACES = ("centre", "top left", "top right", "bottom left", "bottom right")
SUPERSAMPLE = 4


def draw_subject(name, background, size, place, side=256):
    """The character on a plain background, with the sizes and places of scenes: a PIL image, side × side pixels."""
    return draw_parts(SUBJECTS[name], background, size, place, side)


def draw_parts(parts, background, size, place, side):
    canvas = draw_background(background, "plain", side * SUPERSAMPLE)
    centre = 0.5 + OFFSET / 64 * np.array(PLACES[place])
    for polygons, rgb in parts:
        paint(canvas, polygons, rgb, centre, 0.43 * SIZES[size] / 64)
    return canvas.reduce(SUPERSAMPLE)


def paint(canvas, polygons, rgb, centre, radius):
    """Fill the first polygon, cut out the others, and draw the rim in a darker shade. Polygons are in [-1, 1]²."""
    side = canvas.size[0]
    scaled = [np.asarray(p) * radius * side + centre * side for p in polygons]
    mask = Image.new("L", canvas.size)
    for i, polygon in enumerate(scaled):
        ImageDraw.Draw(mask).polygon([tuple(p) for p in polygon], fill=0 if i else 255)
    canvas.paste(rgb, mask=mask)
    rim = tuple(int(c * 0.7) for c in rgb)
    for polygon in scaled:
        closed = [tuple(p) for p in (*polygon, *polygon[:2])]
        ImageDraw.Draw(canvas).line(closed, fill=rim, width=max(1, side // 128), joint="curve")


def sample_creature(rng, parts=10):
    """The parts of a random character: a large body, and smaller shapes in other colours on it."""
    shapes = [oval(0, 0, 1), box(0, 0, 1, 1), heart(0, 0, 1), np.array([(0, -1), (1, 0.85), (-1, 0.85)])]
    creature = []
    for i in range(parts):
        centre, radius = (rng.uniform(-0.7, 0.7, 2), rng.uniform(0.08, 0.4, 2)) if i else (0, rng.uniform(0.7, 0.95, 2))
        rgb = tuple(int(c) for c in rng.choice([30, 90, 160, 220, 250], 3))
        creature.append(([shapes[rng.integers(len(shapes))] * radius + centre], rgb))
    return creature


def sample_spot(rng):
    """A random background, size and place."""
    return [str(rng.choice(list(choice))) for choice in (BACKGROUNDS, SIZES, PLACES)]


def subject_caption(name, background, size, place):
    words = name if size == "large" else f"{size} {name}"
    things, background = f"{article(words)} {words} {where(place)}", f"{article(background)} {background} background"
    return SENTENCES[0].format(things=things, background=background)


def write_subjects(folder):
    """Write <folder>/<name>/01.png, 01.txt, … 05.png, 05.txt for each subject, and the prompts for dit.evaluate.

    The prompts are in DreamBooth's format: five places on five backgrounds, {0} for a token (unused), {1} for the name.
    """
    prompts = [f"'a {{0}} {{1}} {where(place)} on a {background} background'.format(unique_token, class_token)"
               for place in PROMPT_PLACES for background in PROMPT_BACKGROUNDS]  # fmt: skip
    classes = [f"{name},{name}" for name in SUBJECTS]
    lines = ["Classes", "", "subject_name,class", *classes, "", "Prompts", "", "Object Prompts", "", "prompt_list = ["]
    with replacing(Path(folder) / "prompts_and_classes.txt") as temporary:
        temporary.write_bytes("\n".join([*lines, ",\n".join(prompts), "]", ""]).encode())
    for name, pictures in PICTURES.items():
        for i, picture in enumerate(pictures, 1):
            path = Path(folder) / name / f"{i:02}.png"
            with replacing(path) as temporary:
                draw_subject(name, *picture).save(temporary, optimize=True)
            with replacing(path.with_suffix(".txt")) as temporary:
                temporary.write_bytes(f"{subject_caption(name, *picture)}\n".encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the pictures and captions")
    args = parser.parse_args()
    write_subjects(args.out)


if __name__ == "__main__":
    main()
