"""Pictures and captions -> cached latents and text embeddings, so that training needs neither T5 nor the autoencoder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dit.pictures import open_picture, square, to_tensor
from sparsecode.common import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def find_pictures(paths):
    """Picture files among `paths`; a folder stands for the pictures in it, in the order of their names."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
            if not inside:
                raise UserError(f"{path} holds no pictures; expected files ending in {', '.join(SUFFIXES)}")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no picture or folder {path}; check --images")
    return files


def find_caption(file, prompt=None):
    """The caption of a picture: `prompt` if given, else name.txt beside it, else its line in metadata.jsonl."""
    if prompt is not None:
        return prompt
    text = file.with_suffix(".txt")
    if text.exists():
        return _read(text).strip()
    metadata = file.with_name("metadata.jsonl")
    if metadata.exists():
        for number, line in enumerate(_read(metadata).splitlines(), start=1):
            try:
                entry = json.loads(line) if line.strip() else {}
                if entry.get("file_name") == file.name:
                    return str(entry["text"]).strip()
            except (json.JSONDecodeError, AttributeError, KeyError):
                message = 'is not {"file_name": …, "text": …}'
                raise UserError(f"{metadata} line {number} {message}: {line[:60]!r}; mend the line") from None
    raise UserError(f"{file} has no caption; write it into {text.name} or metadata.jsonl beside it, or give --prompt")


def _read(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it in that encoding") from None


@dataclass
class Dataset:
    """n pictures: images (n, 3, H, W) in [-1, 1]; latents (n, 4, h, w) of them and, with `random_flip`, of their mirror
    images, else None; text (n, L, C) and text_mask (n, L) of their captions."""

    images: torch.Tensor
    captions: list[str]
    latents: torch.Tensor
    mirrored: torch.Tensor | None
    text: torch.Tensor
    text_mask: torch.Tensor

    def __len__(self):
        return len(self.captions)


def load_dataset(pipe, paths, prompt=None, resolution=None, random_flip=False):
    """Open, crop to a square and encode pictures and captions with the parts of `pipe`."""
    resolution = resolution or pipe.resolution
    if resolution <= 0 or resolution % pipe.multiple:
        raise UserError(f"--resolution {resolution} is not a multiple of {pipe.multiple} pixels")
    files = find_pictures(paths)
    captions = [find_caption(file, prompt) for file in files]
    images = to_tensor([square(open_picture(file), resolution) for file in files])  # (n, 3, H, W)

    def encode(images):
        bar = tqdm(images.split(1), desc="encoding pictures", disable=None)
        return torch.cat([pipe.encode_images(image).float() for image in bar])  # (n, 4, h, w)

    text, mask = pipe.encode_prompt(captions)  # (n, L, C), (n, L)
    return Dataset(images, captions, encode(images), encode(images.flip(3)) if random_flip else None, text, mask)
