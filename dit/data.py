"""Pictures and captions -> cached latents and embeddings, so that training needs neither T5 nor the autoencoder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dit.parallel import bar_off
from dit.pictures import SUFFIXES, open_picture, square, to_tensor
from sparsecode.common import UserError


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


def find_captions(files, prompt=None):
    """The caption of each picture: `prompt` if given, else name.txt beside it, else its line in metadata.jsonl."""
    if prompt is not None:
        captions = [prompt for _ in files]
    else:
        lines = {}
        for folder in {file.parent for file in files}:
            lines |= _read_metadata(folder)
        captions = [_find_caption(file, lines) for file in files]
    for file, caption in zip(files, captions):
        if not caption.strip():
            raise UserError(f"the caption of {file} is empty; say what the picture shows")
    return captions


def _find_caption(file, lines):
    text = file.with_suffix(".txt")
    if text.exists():
        return _read(text).strip()
    if file in lines:
        return lines[file]
    raise UserError(f"{file} has no caption; write it into {text.name} or metadata.jsonl beside it, or give --prompt")


def _read_metadata(folder):
    """{picture file: caption} of a folder's metadata.jsonl, if it has one."""
    path = folder / "metadata.jsonl"
    captions = {}
    for number, line in enumerate(_read(path).split("\n") if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[folder / entry["file_name"]] = entry["text"].strip()
            entry["text"].encode()
        except (ValueError, TypeError, KeyError, AttributeError):  # not JSON or Unicode, no object, key or text
            message = 'is not {"file_name": …, "text": …}'
            raise UserError(f"{path} line {number} {message}: {line[:60]!r}; mend the line") from None
    return captions


def _read(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it in that encoding") from None


@dataclass
class Dataset:
    """What training needs of n pictures.

    Latents (n, 4, h, w) of the pictures and, for random flips, of their mirror images, else None; embeddings
    text (n, L, C) and text_mask (n, L) of their captions.
    """

    latents: torch.Tensor
    mirrored: torch.Tensor | None
    text: torch.Tensor
    text_mask: torch.Tensor

    def __len__(self):
        return len(self.latents)


def load_images(files, resolution):
    """The middle square of each picture: (n, 3, resolution, resolution) in [-1, 1]."""
    return to_tensor([square(open_picture(file), resolution) for file in files])


def encode(pipe, images, captions, random_flip=False):
    """Images (n, 3, H, W) in [-1, 1] and their captions, through the autoencoder and T5 of `pipe` -> Dataset"""

    def latents(images):
        bar = tqdm(images.split(1), desc="encoding pictures", disable=bar_off())
        return torch.cat([pipe.encode_images(image).float() for image in bar])  # (n, 4, h, w)

    mirrored = latents(images.flip(3)) if random_flip else None
    return Dataset(latents(images), mirrored, *pipe.encode_prompt(captions))
