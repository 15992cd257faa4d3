"""Read and write pictures: files -> RGB, tensors <-> PIL images, and labelled grids of results."""

import functools
import importlib
import textwrap
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sparsecode.common import UserError, replacing

# PIL's name of a format -> the suffixes of its files. Other formats are never tried.
FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jfif"), "WEBP": (".webp",), "BMP": (".bmp",),
           "TIFF": (".tif", ".tiff"), "GIF": (".gif",), "AVIF": (".avif",), "HEIF": (".heic", ".heif"),
           "JXL": (".jxl",)}  # fmt: skip
# Plug-ins for formats that PIL may lack: the module to import, and its pip package.
PLUGINS = {"AVIF": ("pillow_avif", "pillow-avif-plugin"), "HEIF": ("pillow_heif", "pillow-heif"),
           "JXL": ("pillow_jxl", "pillow-jxl-plugin")}  # fmt: skip
SMALLEST = 16  # pixels; a smaller picture is probably an error


@functools.cache
def formats():
    """The names in FORMATS that PIL can read here, with the plug-ins that are installed."""
    Image.init()
    for name, (module, _) in PLUGINS.items():
        try:
            plugin = None if name in Image.OPEN else importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def why_not(path):
    """Why a path is not a picture, in a few words; None if its name and type are those of a picture."""
    path = Path(path)
    name = next((name for name, suffixes in FORMATS.items() if path.suffix.lower() in suffixes), None)
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a file"
    if name is None:
        return "not a picture by its name"
    if name not in formats():
        return f"needs pip install {PLUGINS[name][1]}"


@contextmanager
def _opened(path):
    """The PIL image in a file. Any error while it is read becomes a UserError."""
    if not Path(path).is_file():  # reading a pipe would block
        raise UserError(f"{path} cannot be read as a picture (there is no such file); check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats()) as image:
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # PIL's decoders raise errors of many kinds
        reason = why_not(path) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read as a picture ({reason}); replace it") from None


def open_picture(path):
    """A picture file as an upright RGB PIL image; the first frame of an animation.

    Grey, palette, transparent (onto white), 16-bit and CMYK pictures are converted. UserError if the file is not a
    picture, is truncated, or has a side below 16 pixels.
    """
    with _opened(path) as image:
        image = _to_rgb(ImageOps.exif_transpose(image))  # decodes the pixels
    if min(image.size) < SMALLEST:
        raise UserError(f"{path} is {image.width}×{image.height} pixels; give one of at least {SMALLEST}×{SMALLEST}")
    return image


def _to_rgb(image):
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits a pixel, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, side):
    """The central square of a PIL image, resized to side × side pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def share_cut(path):
    """The share of a picture's area that `square` cuts off, 0 to 1. Reads only the header of the file."""
    with _opened(path) as image:
        return 1 - min(image.size) / max(image.size)


def to_pil(images):
    """Images (B, 3, H, W) in [-1, 1] -> list of PIL images."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images):
    """PIL images of one size -> (B, 3, H, W) in [-1, 1]."""
    return to_bytes(images).float() / 127.5 - 1


def to_bytes(images):
    """PIL images of one size -> (B, 3, H, W) as uint8, a quarter of the memory."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)


def grid(rows, side=128):
    """One PIL image from rows of (label, list of PIL images), each fitted to side × side pixels, below its label."""
    gap, letter = 8, max(13, side // 24)  # pixels; readable beside large pictures too
    font, line = ImageFont.load_default(letter), letter + 4
    columns = max(len(images) for _, images in rows)
    width = gap + columns * (side + gap)
    lines = [_wrap(label, font, width - 2 * gap) for label, _ in rows]
    heights = [gap + line * len(text) * any(text) + side for text in lines]
    canvas = Image.new("RGB", (width, sum(heights) + gap), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    for text, (_, images), height in zip(lines, rows, heights):
        pen.multiline_text((gap, y + gap), "\n".join(text), fill="black", font=font, spacing=4)
        for column, image in enumerate(images):
            sharp = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
            fitted = ImageOps.contain(image, (side, side), sharp)
            canvas.paste(fitted, (gap + column * (side + gap), y + height - side))
        y += height
    return canvas


def _wrap(label, font, width):
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = lines[:-1] + [longer] if not lines[-1] or font.getlength(longer) <= width else [*lines, word]
    return lines


def draw_table(rows, path, title, dpi=150):
    """Save a figure with a row for each (label, {prompt: pictures}) and a column for each prompt of the last row."""
    from matplotlib.figure import Figure

    prompts = list(rows[-1][1])
    counts = [len(rows[-1][1][prompt]) for prompt in prompts]
    width, height = 1.3 + 0.9 * sum(counts), 1.0 + 0.9 * len(rows)  # inches; a picture takes 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    table = figure.subplots(len(rows), len(prompts), squeeze=False, width_ratios=counts)
    for cells, (label, pictures) in zip(table, rows):
        for axes, prompt in zip(cells, prompts):
            axes.set(xticks=[], yticks=[], anchor="W")
            axes.spines[:].set_visible(False)
            if prompt in pictures:
                axes.imshow(side_by_side(pictures[prompt]))
        cells[0].set_ylabel(textwrap.fill(label, 18), rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
    for axes, prompt, count in zip(table[0], prompts, counts):
        axes.set_title(textwrap.fill(prompt, 13 * count), fontsize=8, loc="left", parse_math=False)
    figure.suptitle(textwrap.fill(title, round(11 * width)), fontsize=10, parse_math=False)
    save_figure(figure, path, dpi)


def side_by_side(pictures):
    """PIL images of one size -> one array (H, W, 3), with white between them."""
    pixels = [np.asarray(picture) for picture in pictures]
    gap = np.full_like(pixels[0][:, : len(pixels[0]) // 24], 255)  # (H, H/24, 3)
    parts = [part for picture in pixels for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)  # (H, W, 3)


def check_picture_path(path):
    """UserError, before any work, if `path` is a folder or its suffix is not that of a picture."""
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE.keys() & FORMATS.keys():
        raise UserError(f"{path} does not end like a picture; name it something.png")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file")


def save_picture(image, path):
    with replacing(path) as temporary:
        image.save(temporary)


def save_each(rows, folder):
    """Save each picture of rows of (label, list of PIL images) at full size, as folder/ROW-COLUMN.png, from 1-1."""
    for i, (_, images) in enumerate(rows, start=1):
        for j, image in enumerate(images, start=1):
            save_picture(image, Path(folder) / f"{i}-{j}.png")


def save_figure(figure, path, dpi=120):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
