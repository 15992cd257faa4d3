"""Teach a frozen PixArt-Σ a concept with a sparse dictionary beside each self-attention (§4.1–4.3).

    python -m dit.finetune --images lessons/data/subjects/robot

Prompt and pictures are encoded once; then only the adapter is trained, on  ‖ε(x_t, t, prompt) − ε‖²  at random t.
Writes adapter.safetensors, training.csv, loss.png, before_after.png and its pictures at full size into --out.
"""

import argparse
import csv
import math
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np

from dit import parallel
from dit.cli import Parser, add_model_arguments, check_folder, load_pipeline, positive, run, seed, unicode, whole
from dit.data import describe_pictures, find_captions, find_pictures, load_images
from dit.pictures import grid, save_each, save_figure, save_picture, to_pil
from dit.train import HOLD, OPTIMIZERS, SCHEDULES, Checkpoint, TrainConfig, fingerprint, fit
from sparsecode import detach, load_adapter, read_header, trainable
from sparsecode.attach import METHODS
from sparsecode.common import UserError, locked, remove_leftovers, replacing

OUTPUTS = ("adapter.safetensors", "training.csv", "loss.png", "before_after.png", "pictures", "checkpoint.pt")
OPTIONS = ("atoms", "density", "threshold", "lam", "order")  # of the sparse method
CONFIGURED = {f.name for f in fields(TrainConfig)} | set(OPTIONS)  # what goes into a TrainConfig
SHOWN_CAPTIONS = 3  # of the training pictures' captions, in before_after.png


# ---- after training ---------------------------------------------------------------------------------------------


def write_csv(losses, path):
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss"])
        rows.writerows((step, f"{loss:.6f}") for step, loss in enumerate(losses))


def plot_losses(losses, path):
    from matplotlib.figure import Figure

    window = max(1, len(losses) // 10)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, alpha=0.25, label="each step")
    axes.plot(range(window - 1, len(losses)), smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="squared error of the noise", title="training loss", yscale="log")
    axes.legend()
    save_figure(figure, path)


def draw_prompts(pipe, prompts, n, resolution):
    """A list of n pictures for each prompt, from the seeds 0, 1, …"""
    noise = pipe.noise(range(n), resolution, resolution)  # (n, 4, h, w)
    return [pipe.generate([prompt] * n, latents=noise) for prompt in prompts]


# ---- the command ------------------------------------------------------------------------------------------------


def weight(text):
    """For argparse: a number of 0 or more, and not infinite."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return float(text)


def parse(argv=None):
    parser = Parser(prog="python -m dit.finetune", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--images", nargs="+", required=True, metavar="PATH", help="a folder or files; captions in name.txt beside")
    add("--prompt", type=unicode, help="caption of all pictures, instead of files")
    add("--from", dest="start", type=unicode, metavar="FILE", help="train this adapter; omit --method to --target")
    add("--method", choices=METHODS, help="(sparse)")
    add("--atoms", type=int, help="M, the atoms beside each attention")
    add("--density", type=float, help="ρ, the share of atoms that a token uses")
    add("--threshold", choices=("top_k", "soft", "relu"), help="σ (top_k)")
    add("--lam", type=float, help="λ of --threshold soft or relu")
    add("--order", choices=("before", "after"), help="σ before attention mixes (§3.4, the default) or after it (Eq. 8)")
    add("--target", help="regular expression for the attentions to adapt (attn1)")
    add("--orthogonality", type=weight, default=0.0, help="weight of the penalty on atoms that are alike (Appendix A)")
    add("--epochs", type=whole)
    add("--repeats", type=whole, help="how often an epoch visits each picture")
    add("--batch-size", type=whole, help="of each process")
    add("--gradient-accumulation", type=whole, default=1, help="batches for each step of the optimizer")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw (§4.3) or came (Appendix B)")
    add("--lr", type=positive, help="(the model's own for adamw, 1e-4 for came)")
    add("--lr-schedule", choices=SCHEDULES, help=f"constant, or inverse-square: 1/step² from step {HOLD} (the model's)")
    add("--resolution", type=whole, help="side of the training pictures in pixels")
    add("--random-flip", action="store_true", help="train on mirror images as well")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--seed", type=seed, default=0)
    add("--compile", action="store_true", help="compile the model: minutes at the start, faster steps on a GPU")
    add("--out", type=Path, help="folder for the results (runs/NAME; runs/NAME-METHOD unless sparse)")
    add("--samples", type=int, default=5, help="pictures of each prompt, before and after; 0 for none")
    add("--validation-prompt", type=unicode, nargs="+", default=[], metavar="PROMPT", help="more prompts to draw")
    add("--checkpoint-every", type=whole, default=100, help="steps")
    add("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args(argv)
    if not 0 <= args.samples <= 100:
        raise UserError(f"--samples {args.samples}; give a number from 0 to 100")
    name = Path(args.images[0]).resolve().stem
    method = (args.method or "sparse") if args.start is None else read_header(args.start)["method"]
    args.out = args.out or Path("runs") / (name if method == "sparse" else f"{name}-{method}")
    return args


def check_out(out, resume):
    """Refuse also a folder that holds a run which is not to go on."""
    present = check_folder(out, OUTPUTS)
    if "adapter.safetensors" in present and "checkpoint.pt" not in present:
        raise UserError(f"--out {out} holds a finished run; name another folder, or remove it to train again")
    if present and not resume:
        raise UserError(f"--out {out} holds an unfinished run; add --resume to go on with it, or name another folder")


def finetune(pipe, files, captions, args):
    """The whole run: encode, free, train, save, draw. The first mistake ends it before anything is written."""
    given = {name: value for name, value in vars(args).items() if name in CONFIGURED}
    config = TrainConfig.of(pipe, **given)
    images = load_images(files, config.resolution)  # (n, 3, H, W)
    settings = fingerprint(pipe, images, captions, config)
    prompts = list(dict.fromkeys(captions))[:SHOWN_CAPTIONS] + args.validation_prompt if args.samples else []
    file = args.out / "checkpoint.pt"
    checkpoint = Checkpoint(file, settings, args.checkpoint_every)  # refuses that of another run
    pipe.remember(["", *captions, *prompts])
    config.attach(pipe.transformer)  # refuses what cannot be attached
    detach(pipe.transformer)
    with locked(args.out) if parallel.rank() == 0 else nullcontext():
        if parallel.rank() == 0:
            check_out(args.out, args.resume)  # another run may have been here meanwhile
            remove_leftovers(args.out)
            print(describe_pictures(args.images, files))
        losses = fit(pipe, images, captions, config, args.out / "adapter.safetensors", checkpoint)
        if parallel.rank() == 0:
            save_results(pipe, images, prompts, losses, args)
            file.unlink()  # now the run is finished


def save_results(pipe, images, prompts, losses, args):
    model, out = pipe.transformer, args.out
    write_csv(losses, out / "training.csv")
    plot_losses(losses, out / "loss.png")
    trained = sum(parameter.numel() for parameter in trainable(model))
    total = sum(parameter.numel() for parameter in model.parameters()) - trained
    after = draw_prompts(pipe, prompts, args.samples, images.shape[-1]) if args.samples else []
    detach(model)
    if args.samples:
        if args.start:
            load_adapter(model, args.start)
        before = draw_prompts(pipe, prompts, args.samples, images.shape[-1])
        rows = [("training pictures", to_pil(images[: args.samples]))]
        for prompt, base, adapted in zip(prompts, before, after):
            rows += [(f"before: {prompt}", base), (f"after: {prompt}", adapted)]
        save_each(rows[1:], out / "pictures")
        save_picture(grid(rows, min(512, max(128, images.shape[-1]))), out / "before_after.png")
    seen = out / ("before_after.png" if args.samples else "loss.png")
    print(f"trained {trained:,} parameters beside {total:,} in {len(losses)} steps; see {seen}")


def main(argv=None):
    args = parse(argv)
    check_out(args.out, args.resume)
    files = find_pictures(args.images)
    captions = find_captions(files, args.prompt)
    parallel.start()
    finetune(load_pipeline(args), files, captions, args)


if __name__ == "__main__":
    run(main)
