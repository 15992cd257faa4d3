"""Teach a frozen PixArt-Σ a concept with a sparse dictionary beside each self-attention (§4.1–4.3).

    python -m dit.finetune --images lessons/data/subjects/robot

Prompt and pictures are encoded once; then only the adapter is trained, on  ‖ε(x_t, t, prompt) − ε‖²  at random t.
Writes adapter.safetensors, training.csv, loss.png and before_after.png into --out.
"""

import argparse
import csv
import math
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit import parallel
from dit.came import CAME
from dit.cli import Parser, add_model_arguments, load_pipeline, positive, run, seed, unicode, whole
from dit.data import encode, find_captions, find_pictures, load_images
from dit.diffusion import add_noise, noise_error, sampling_timesteps
from dit.pictures import grid, save_figure, save_picture, to_pil
from sparsecode import adapters, attach, detach, orthogonality, record_usage, save_adapter, trainable
from sparsecode.attach import METHODS
from sparsecode.common import UserError, replacing

# The paper's setting on the released weights (Appendix B); a model's own come from its defaults.json.
DEFAULTS = {"epochs": 15, "repeats": 10, "batch_size": 1, "lr": 1e-4, "atoms": 256, "density": 0.02}
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, weight_decay=0.0), "came": CAME}
HOLD = 125  # steps at the full learning rate; then it falls as 1/step, since the rest of the model suffers from its sum
OUTPUTS = ("adapter.safetensors", "training.csv", "loss.png", "before_after.png", "checkpoint.pt")
SEEDS = (0, 1, 2, 3, 4)  # of the pictures before and after
SHOWN_CAPTIONS = 3  # of the training pictures' captions, in before_after.png


class Diverged(UserError):
    """The loss is no number any more."""


# ---- training ---------------------------------------------------------------------------------------------------


def visiting_order(n, epochs, repeats, seed):
    """Which picture each visit goes to, (epochs · repeats · n,): every epoch a new order of `repeats` times all n."""
    orders = [np.random.default_rng([seed, 0, e]).permutation(n * repeats) % n for e in range(epochs)]
    return np.concatenate(orders)


def training_loss(model, data, order, visits, seed, schedule):
    """Mean squared error of the predicted noise over B visits, each with a flip, a timestep and noise of its own.

    These depend on the seed and the number of the visit alone. So they stay the same in a run that goes on after a
    kill, and however the visits are spread over batches and processes.
    """
    device, dtype = data.text.device, data.text.dtype
    draws = [np.random.default_rng([seed, 1, visit]) for visit in visits]
    flip = torch.tensor([rng.random() < 0.5 for rng in draws], device=device)  # (B,)
    timesteps = torch.tensor([int(rng.integers(schedule.num_train_timesteps)) for rng in draws], device=device)  # (B,)
    noise = np.stack([rng.standard_normal(data.latents.shape[1:], dtype=np.float32) for rng in draws])
    noise = torch.from_numpy(noise).to(device)  # (B, 4, h, w)
    picks = torch.from_numpy(order[list(visits)]).to(device)  # (B,)
    latents = data.latents[picks]  # (B, 4, h, w)
    if data.mirrored is not None:
        latents = torch.where(flip[:, None, None, None], data.mirrored[picks], latents)

    def predict(noisy, *rest):
        return model(noisy.to(dtype), *rest)

    text, mask = data.text[picks], data.text_mask[picks]  # (B, L, C), (B, L)
    return noise_error(predict, latents, timesteps, noise, text, mask, schedule).mean()


def train(model, data, args, state, file, schedule):
    """Steps on the adapters of `model`, from the checkpoint `state` on if there is one; returns the loss of every step.

    A checkpoint is written to `file` once its weights have proved good, by a loss that is a number; after the last step
    in any case.
    """
    parameters = trainable(model)
    optimizer = OPTIMIZERS[args.optimizer](parameters, lr=args.lr)
    order = visiting_order(len(data), args.epochs, args.repeats, args.seed)
    per_step = args.batch_size * args.gradient_accumulation * parallel.world_size()
    steps = math.ceil(len(order) / per_step)
    order = np.resize(order, steps * per_step)  # begins again, so that the last step is as full as the others
    losses = restore(model, optimizer, state) if state else []
    bar = tqdm(range(len(losses), steps), "training", steps, initial=len(losses), disable=parallel.bar_off())
    for step in bar:
        visits = range(step * per_step, (step + 1) * per_step)[parallel.rank() :: parallel.world_size()]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, HOLD / (step + 1))
        optimizer.zero_grad()
        total = torch.zeros(1, device=data.text.device)
        for start in range(0, len(visits), args.batch_size):
            batch = visits[start : start + args.batch_size]
            loss = training_loss(model, data, order, batch, args.seed, schedule) / args.gradient_accumulation
            loss.backward()
            total += loss.detach()
        if args.orthogonality:
            (args.orthogonality * orthogonality(model)).backward()
        parallel.average([total, *(p.grad for p in parameters)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (math.isfinite(total) and math.isfinite(norm)):
            kept = f"{file} keeps an earlier step" if file.exists() else "nothing was kept"
            raise Diverged(f"the loss became {total.item()} at step {step}; {kept}; try a smaller --lr than {args.lr}")
        if step > 0 and step % args.checkpoint_every == 0:
            save_checkpoint(file, model, optimizer, losses, args)
        optimizer.step()
        losses.append(total.item())
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}", refresh=False)
    save_checkpoint(file, model, optimizer, losses, args)
    return losses


# ---- checkpoints ------------------------------------------------------------------------------------------------


def save_checkpoint(file, model, optimizer, losses, args):
    if parallel.rank() == 0:
        weights = {name: adapter.state_dict() for name, adapter in adapters(model).items()}
        state = {"adapters": weights, "optimizer": optimizer.state_dict(), "losses": losses, "settings": args.settings}
        with replacing(file) as temporary, open(temporary, "wb") as opened:
            torch.save(state, opened)


def read_checkpoint(file, settings):
    """The state in a checkpoint; UserError if it cannot be read or is that of a run with other settings."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        then = state["settings"]
    except Exception as error:  # torch raises many kinds
        reason = type(error).__name__
        raise UserError(f"{file} cannot be read as a checkpoint ({reason}); remove it to start again") from None
    for name, value in settings.items():
        if then.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{file} belongs to a run with {option} {then.get(name)}, not {value}; use another --out")
    return state


def restore(model, optimizer, state):
    """Put a checkpoint's weights and moments in place; returns the losses up to there."""
    for name, adapter in adapters(model).items():
        adapter.load_state_dict(state["adapters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"]


def describe(args, options, pipe, images, captions):
    """What a run must not change when it goes on: {name: text}."""
    free = {"out", "resume", "device", "checkpoint_every", "validation_prompt", "prompt"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["images"] = f"{len(images)} pictures, checksum {zlib.crc32(images.numpy().tobytes())}, captions {captions}"
    settings |= {"weights": pipe.folder.resolve(), "dtype": pipe.dtype, "nproc_per_node": parallel.world_size()}
    settings |= options
    return {name: str(value) for name, value in settings.items()}


# ---- after training ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_usage(model, data, seed, schedule):
    """Record how much each atom is used, on the training pictures at ten timesteps: what `keep_atoms` ranks by."""
    rng = np.random.default_rng([seed, 2])
    with record_usage(model):
        for t in sampling_timesteps(10, schedule):
            for latents, text, mask in zip(data.latents.split(1), data.text.split(1), data.text_mask.split(1)):
                noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)).to(latents)
                timesteps = t.view(1).to(latents.device)
                model(add_noise(latents, noise, timesteps, schedule).to(text.dtype), timesteps, text, mask)


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


def draw_prompts(pipe, prompts, resolution):
    """A list of pictures for each prompt, one for each of SEEDS."""
    noise = pipe.noise(SEEDS, resolution, resolution)  # (5, 4, h, w)
    return [pipe.generate([prompt] * len(SEEDS), latents=noise) for prompt in prompts]


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
    add("--method", choices=METHODS, default="sparse")
    add("--atoms", type=int, help="M, the atoms beside each attention")
    add("--density", type=float, help="ρ, the share of atoms that a token uses")
    add("--threshold", choices=("top_k", "soft", "relu"), help="σ (top_k)")
    add("--lam", type=float, help="λ of --threshold soft or relu")
    add("--order", choices=("before", "after"), help="σ before attention mixes (§3.4, the default) or after it (Eq. 8)")
    add("--orthogonality", type=weight, default=0.0, help="weight of the penalty on atoms that are alike (Appendix A)")
    add("--target", default="attn1", help="regular expression for the attentions to adapt")
    add("--epochs", type=whole)
    add("--repeats", type=whole, help="how often an epoch visits each picture")
    add("--batch-size", type=whole, help="of each process")
    add("--gradient-accumulation", type=whole, default=1, help="batches for each step of the optimizer")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw (§4.3) or came (Appendix B)")
    add("--lr", type=positive, help="(the model's own for adamw, 1e-4 for came)")
    add("--resolution", type=whole, help="side of the training pictures in pixels")
    add("--random-flip", action="store_true", help="train on mirror images as well")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--seed", type=seed, default=0)
    add("--out", type=Path, help="folder for the results (runs/NAME)")
    add("--validation-prompt", type=unicode, nargs="+", default=[], metavar="PROMPT", help="more prompts to draw")
    add("--checkpoint-every", type=whole, default=100, help="steps")
    add("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.images[0]).resolve().stem
    return args


def check_folder(out, outputs):
    """The names of the files in a folder; refused if it cannot be written or holds others than `outputs`."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out} cannot be made: {there} is no folder that you may write to")
    present = {file.name for file in out.iterdir() if not file.name.startswith(".")} if out.exists() else set()
    if foreign := sorted(present - set(outputs)):
        raise UserError(f"--out {out} holds other files ({foreign[0]}); name a new or empty folder")
    return present


def check_out(out, resume):
    """Refuse also a folder that holds a run which is not to go on."""
    present = check_folder(out, OUTPUTS)
    if "adapter.safetensors" in present and "checkpoint.pt" not in present:
        raise UserError(f"--out {out} holds a finished run; name another folder, or remove it to train again")
    if present and not resume:
        raise UserError(f"--out {out} holds an unfinished run; add --resume to go on with it, or name another folder")


def remove_leftovers(out):
    """Remove the temporary files of a run that was killed while it wrote."""
    for name in OUTPUTS:
        for file in out.glob(f".[0-9]*.{name}"):
            file.unlink()


def complete(args, pipe):
    """Fill in what the user left open, from the model's defaults.json and then the paper's."""
    defaults = DEFAULTS | pipe.defaults.get("finetune", {})
    if args.optimizer == "came":
        defaults["lr"] = DEFAULTS["lr"]  # a model's own is for AdamW, whose steps are shorter
    for name in ("epochs", "repeats", "batch_size", "lr"):
        setattr(args, name, getattr(args, name) or defaults[name])
    args.resolution = args.resolution or pipe.resolution
    if args.resolution % pipe.multiple:
        raise UserError(f"--resolution {args.resolution} is not a multiple of {pipe.multiple} pixels")
    return method_options(args, defaults)


def method_options(args, defaults):
    """What `attach` needs to know; an option that the method would not use is refused."""
    options = {name: getattr(args, name) for name in ("atoms", "density", "threshold", "lam", "order")}
    options = {name: value for name, value in options.items() if value is not None}
    if args.method != "sparse":
        if options:
            raise UserError(f"--method {args.method} does not use --{next(iter(options))}; leave it out")
        if args.orthogonality:
            raise UserError(f"--method {args.method} does not use --orthogonality; leave it out")
        return {}
    threshold = options.get("threshold", "top_k")
    if threshold != "top_k" and "density" in options:
        raise UserError(f"--threshold {threshold} does not use --density but --lam; leave it out")
    own = ("atoms", "density") if threshold == "top_k" else ("atoms",)
    return {name: defaults[name] for name in own} | options


def finetune(pipe, files, captions, args):
    """The whole run: encode, free, train, save, draw. The first mistake ends it before anything is written."""
    options = complete(args, pipe)
    model = pipe.transformer
    torch.manual_seed(args.seed)
    attach(model, args.method, args.target, **options)
    model.gradient_checkpointing = args.gradient_checkpointing

    images = load_images(files, args.resolution)  # (n, 3, H, W)
    args.settings = describe(args, options, pipe, images, captions)
    file = args.out / "checkpoint.pt"
    state = read_checkpoint(file, args.settings) if file.exists() else None
    data = encode(pipe, images, captions, args.random_flip)
    prompts = list(dict.fromkeys(captions))[:SHOWN_CAPTIONS] + args.validation_prompt
    pipe.encode_prompt(["", *prompts])  # remembered, so that T5 can go
    pipe.free("text_encoder", "vae")

    losses = train(model, data, args, state, file, pipe.schedule)
    if parallel.rank() == 0:
        remove_leftovers(args.out)
        save_results(pipe, data, images, captions, prompts, losses, args)
        file.unlink()  # now the run is finished


def save_results(pipe, data, images, captions, prompts, losses, args):
    model = pipe.transformer
    if args.method == "sparse":
        measure_usage(model, data, args.seed, pipe.schedule)
    names = ("seed", "epochs", "repeats", "batch_size", "gradient_accumulation", "optimizer", "lr", "orthogonality")
    names += ("resolution", "random_flip")
    notes = {name: getattr(args, name) for name in names}
    save_adapter(model, args.out / "adapter.safetensors", prompt=captions[0], steps=len(losses), **notes)
    write_csv(losses, args.out / "training.csv")
    plot_losses(losses, args.out / "loss.png")

    trained = sum(parameter.numel() for parameter in trainable(model))
    after = draw_prompts(pipe, prompts, args.resolution)
    detach(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    before = draw_prompts(pipe, prompts, args.resolution)
    rows = [("training pictures", to_pil(images[: len(SEEDS)]))]
    for prompt, base, adapted in zip(prompts, before, after):
        rows += [(f"before: {prompt}", base), (f"after: {prompt}", adapted)]
    save_picture(grid(rows), args.out / "before_after.png")
    print(f"trained {trained:,} parameters beside {total:,} in {len(losses)} steps; see {args.out}/before_after.png")


def main(argv=None):
    args = parse(argv)
    check_out(args.out, args.resume)
    files = find_pictures(args.images)
    captions = find_captions(files, args.prompt)
    parallel.start()
    finetune(load_pipeline(args), files, captions, args)


if __name__ == "__main__":
    run(main)
