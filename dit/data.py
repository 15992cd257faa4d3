"""Pictures and captions -> cached latents and embeddings, so that training needs neither T5 nor the autoencoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dit.parallel import bar_off
from dit.pictures import FORMATS, open_picture, share_cut, square, to_tensor, why_not
from sparsecode.common import TEXT, UserError, read_json


def find_pictures(paths):
    """The files in `paths`; a folder stands for the pictures in it, sorted by name. UserError if there is none."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in _shown(path) if why_not(file) is None]
            if not inside:
                skipped = "".join(f"; {file.name}: {why_not(file)}" for file in _shown(path)[:3])
                suffixes = ", ".join(suffix for group in FORMATS.values() for suffix in group)
                raise UserError(f"{path} holds no pictures; expected files ending in {suffixes}{skipped}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"there is no picture or folder {path}; check --images")
    return files


def _shown(folder):
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def describe_pictures(paths, files):
    """One line about the pictures of `find_pictures`: how many, what was skipped and why, what `square` cuts off."""
    parts = [f"{len(files)} pictures" if len(files) > 1 else f"1 picture, {files[0].name}"]
    beside = [file for path in map(Path, paths) if path.is_dir() for file in _shown(path) if why_not(file)]
    skipped = [file for file in beside if file.suffix.lower() not in (".txt", ".jsonl")]
    parts += [f"skipped {file.name} ({why_not(file)})" for file in skipped[:5]]
    parts += [f"and {len(skipped) - 5} more"] if len(skipped) > 5 else []
    shares = {file: share_cut(file) for file in files}
    widest = max(shares, key=shares.get)
    if shares[widest] > 0:
        parts.append(f"the middle square leaves out {shares[widest]:.0%} of {widest.name}")
    return ", ".join(parts)


def find_captions(files, prompt=None):
    """The caption of each picture: `prompt`, or name.txt beside it, or its line in metadata.jsonl; else UserError."""
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
    for beside in (text, file.with_suffix(".TXT")):
        if beside.exists():
            return _read(beside).strip()
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
        entry = read_json(line, {"file_name": TEXT, "text": TEXT}, where=f"{path} line {number}")
        captions[folder / entry["file_name"]] = entry["text"].strip()
    return captions


def _read(path):
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"{path} is not a file; write the caption into a text file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it in that encoding") from None


@dataclass
class Dataset:
    """The training data of n pictures.

    latents (n, 4, h, w); mirrored, the latents of the mirror images for random flips, or None; and text (n, L, C) and
    text_mask (n, L), the embedded captions.
    """

    latents: torch.Tensor
    mirrored: torch.Tensor | None
    text: torch.Tensor
    text_mask: torch.Tensor

    def __len__(self):
        return len(self.latents)


def load_images(files, resolution):
    """The central square of each picture file: (n, 3, resolution, resolution) in [-1, 1]."""
    return to_tensor([square(open_picture(file), resolution) for file in files])


def encode(pipe, images, captions, random_flip=False):
    """Encode images (n, 3, H, W) in [-1, 1] and their n captions with the autoencoder and T5 of `pipe` -> Dataset"""

    def latents(images):
        bar = tqdm(images.split(1), desc="encoding pictures", disable=bar_off())
        return torch.cat([pipe.encode_images(image).float() for image in bar])  # (n, 4, h, w)

    mirrored = latents(images.flip(3)) if random_flip else None
    return Dataset(latents(images), mirrored, *pipe.encode_prompt(captions))
