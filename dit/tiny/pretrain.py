"""Train a tiny PixArt-Σ from scratch, on scenes: `python -m dit.tiny.pretrain --out runs/tiny`.

    tokenizer -> autoencoder -> text encoder -> transformer -> judge -> clip

With `--resume`, finished stages (in `--out`) are skipped and an interrupted one continues from its checkpoint.
The order is that of the real model: autoencoder and text encoder are trained first, on their own, and stay frozen.
On a CPU two processes of one thread each are the fastest: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m …
"""

import json
import os
from pathlib import Path

import torch

from dit import parallel
from dit.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae, save_index, save_part
from dit.cli import Parser, positive, run, seed, whole
from dit.metrics import need_transformers
from dit.tiny.autoencoder import train_vae
from dit.tiny.clip import train_clip
from dit.tiny.generator import HEADS, train_transformer
from dit.tiny.judge import save_judge, train_judge
from dit.tiny.text import train_text, train_tokenizer
from sparsecode.common import UserError, read_json, replacing

# The content of the model's defaults.json: the guidance (with the weights before the last ones dit.tiny.judge saw no
# difference from 1.5 to 3), and fine-tuning settings that teach a new subject in a minute or less on two CPU cores.
DEFAULTS = {"guidance": 2.0, "finetune": {"epochs": 40, "batch_size": 4, "lr": 0.0012, "lr_schedule": "inverse-square"}}


def parse(argv=None):
    parser = Parser(prog="python -m dit.tiny.pretrain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tiny"), help="folder for the pipeline")
    add("--work", type=Path, default=Path("runs/pretrain"), help="folder for checkpoints, caches and losses")
    add("--resume", action="store_true", help="continue from the files in --out and --work")
    add("--vae-steps", type=whole, default=3600)
    add("--vae-pictures", type=whole, default=12000)
    add("--text-steps", type=whole, default=4000)
    add("--pictures", type=whole, default=48000, help="training scenes of the transformer")
    add("--width", type=whole, default=128, help="width of the transformer")
    add("--layers", type=whole, default=8, help="blocks of the transformer")
    add("--batch-size", type=whole, default=32, help="batch size of the transformer, for each process")
    add("--lr", type=positive, default=1e-3, help="learning rate of the transformer")
    add("--steps", type=whole, default=15000, help="training steps of the transformer")
    add("--judge-steps", type=whole, default=5000)
    add("--clip-steps", type=whole, default=3500)
    add("--clip-pictures", type=whole, default=16000)
    add("--seed", type=seed, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.width % (2 * HEADS):
        raise UserError(f"--width {args.width} does not split over {HEADS} heads; choose a multiple of {2 * HEADS}")
    return args


def check_folders(args):
    """UserError if the folders hold files without --resume, or files of a run with other settings."""
    free = {"out", "work", "resume", "device"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    file = args.work / "settings.json"
    if args.resume and file.exists():
        then = read_json(file)
        for name, value in settings.items():
            if then.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{args.work} belongs to a run with {option} {then.get(name)}, not {value}")
    elif not args.resume and any(f.exists() and any(f.iterdir()) for f in (args.out, args.work)):
        raise UserError(f"{args.out} or {args.work} holds files; add --resume to go on, or name new folders")
    parallel.wait()  # until all have checked
    if parallel.rank() == 0:
        write_json(settings, file)


def write_json(content, path):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def stage(there, train, save):
    """Train in all processes and save in the first one, unless the path `there` exists."""
    if not there.exists():
        trained = train()
        if parallel.rank() == 0:
            save(trained)
    parallel.wait()


def main(argv=None):
    args = parse(argv)
    need_transformers()
    parallel.start()
    check_folders(args)
    out, work = args.out, args.work

    def part(name, train, load):
        stage(out / name / "config.json", train, lambda model: save_part(model, out / name))
        return load(out / name).to(args.device)

    stage(out / "tokenizer" / "spiece.model", lambda: None, lambda _: train_tokenizer(args, out / "tokenizer"))
    tokenizer = load_tokenizer(out / "tokenizer")
    vae = part("vae", lambda: train_vae(args, work), load_vae)
    encoder = part("text_encoder", lambda: train_text(args, tokenizer, work), load_text_encoder)
    part("transformer", lambda: train_transformer(args, vae, tokenizer, encoder, work), load_transformer)
    judge = out / "judge"
    stage(judge / "model.safetensors", lambda: train_judge(args, vae, work), lambda trained: save_judge(trained, judge))
    stage(out / "clip", lambda: train_clip(args, vae, work), lambda parts: save_clip(parts, out / "clip"))
    if parallel.rank() == 0:
        save_index(out)
        write_json(DEFAULTS, out / "defaults.json")
        print(f"{out} is complete; see how good it is with: python -m dit.tiny.judge --weights {out}")


def save_clip(parts, folder):
    """Save all parts or none: the complete folder gets its name last."""
    for part in parts:
        part.save_pretrained(folder.with_name(".clip"))
    os.replace(folder.with_name(".clip"), folder)


if __name__ == "__main__":
    run(main)
