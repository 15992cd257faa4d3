"""Teach a frozen PixArt-Σ a concept with a sparse dictionary beside each self-attention (§4.1–4.3).

    python -m dit.finetune --images lessons/data/subjects/robot

Prompt and pictures are encoded once; then only the adapter is trained, on  ‖ε(x_t, t, prompt) − ε‖²  at random t.
Writes adapter.safetensors, training.csv, loss.png and before_after.png into --out.
"""

import argparse
import csv
import io
import math
from pathlib import Path

import torch
from tqdm import tqdm

from dit import parallel
from dit.cli import add_model_arguments, load_pipeline, run
from dit.data import load_dataset
from dit.diffusion import add_noise, noise_error, sampling_timesteps
from dit.pictures import grid, save_picture, to_pil
from sparsecode import adapters, attach, record_usage, save_adapter, trainable
from sparsecode.attach import METHODS
from sparsecode.common import UserError, replacing

# The paper's setting on the released weights (Appendix B); a model's own come from its defaults.json.
DEFAULTS = {"epochs": 15, "repeats": 10, "batch_size": 1, "lr": 1e-4, "density": 0.02, "atoms": 256}
OUTPUTS = {"adapter.safetensors", "training.csv", "loss.png", "before_after.png", "checkpoint.pt"}
SEEDS = (0, 1, 2, 3, 4)  # of the pictures before and after


def generator(*numbers):
    """Random numbers for one purpose, on the CPU: the same wherever and whenever they are drawn."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


def visits(n, epochs, repeats, seed):
    """Which picture each step of training looks at: every epoch a new order of `repeats` times all n."""
    orders = [torch.randperm(n * repeats, generator=generator(seed, 0, e)) % n for e in range(epochs)]
    return torch.cat(orders)  # (epochs · repeats · n,)


def training_loss(model, data, picks, seed, step):
    """Mean squared error of the predicted noise for the pictures `picks` (B,), at random timesteps.

    All that is random depends on (seed, step, process) alone: a run that goes on after a kill draws what it would have.
    """
    draws = generator(seed, 1, step, parallel.rank())
    latents = data.latents[picks.to(data.latents.device)]  # (B, 4, h, w)
    if data.mirrored is not None:
        flip = (torch.rand(len(picks), generator=draws) < 0.5).to(latents.device)
        latents = torch.where(flip[:, None, None, None], data.mirrored[picks.to(latents.device)], latents)
    t = torch.randint(0, 1000, (len(picks),), generator=draws).to(latents.device)  # (B,)
    noise = torch.randn(latents.shape, generator=draws).to(latents.device)  # (B, 4, h, w)
    text, mask = data.text[picks.to(data.text.device)], data.text_mask[picks.to(data.text.device)]
    return noise_error(model, latents.to(text.dtype), t, noise.to(text.dtype), text, mask).mean()


def train(model, data, args, checkpoint):
    """AdamW on the adapters of `model`; returns the loss of every step. Goes on from `checkpoint` if it exists."""
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    order = visits(len(data), args.epochs, args.repeats, args.seed)
    per_step = args.batch_size * args.gradient_accumulation * parallel.world_size()
    steps = math.ceil(len(order) / per_step)
    order = order.repeat(2 + per_step // len(order))[: steps * per_step]  # the last step is as full as the others
    losses = load_checkpoint(checkpoint, model, optimizer, args) if checkpoint.exists() else []
    bar = tqdm(range(len(losses), steps), "training", steps, initial=len(losses), disable=bar_off(), mininterval=1)
    for step in bar:
        mine = order[step * per_step : (step + 1) * per_step][parallel.rank() :: parallel.world_size()]
        optimizer.zero_grad()
        total = 0.0
        for part, picks in enumerate(mine.split(args.batch_size)):
            loss = training_loss(model, data, picks, args.seed, step * args.gradient_accumulation + part)
            (loss * len(picks) / len(mine)).backward()
            total += loss.item() * len(picks) / len(mine)
        parallel.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # (the same in every process, as are the gradients)
        if not math.isfinite(norm):
            kept = f"{checkpoint} holds step {saved}" if (saved := saved_step(checkpoint)) else "nothing was kept"
            raise UserError(f"the loss became {total} at step {step}; {kept}. Try a smaller --lr than {args.lr}")
        optimizer.step()
        losses.append(total)
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, model, optimizer, losses, args)
    return losses


def bar_off():
    """For tqdm's `disable`: quiet when not on a terminal, and in all processes but the first."""
    return True if parallel.rank() else None


# ---- checkpoints ------------------------------------------------------------------------------------------------


def settings(args):
    """What a run must not change when it goes on."""
    skip = {"out", "resume", "device", "checkpoint_every", "validation_prompt"}
    return {name: str(value) for name, value in sorted(vars(args).items()) if name not in skip}


def save_checkpoint(file, model, optimizer, losses, args):
    if parallel.rank() == 0:
        state = {name: adapter.state_dict() for name, adapter in adapters(model).items()}
        everything = {"adapters": state, "optimizer": optimizer.state_dict(), "losses": losses}
        with replacing(file) as temporary:
            torch.save({**everything, "settings": settings(args)}, temporary)


def read_checkpoint(file):
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"{file} cannot be read as a checkpoint ({reason}); remove it to start again") from None


def saved_step(file):
    return len(read_checkpoint(file)["losses"]) if file.exists() else 0


def load_checkpoint(file, model, optimizer, args):
    state = read_checkpoint(file)
    now = settings(args)
    changed = [f"{k} was {v}, is {now.get(k)}" for k, v in state["settings"].items() if v != now.get(k)]
    if changed:
        raise UserError(f"{file} belongs to a run with other settings: {'; '.join(changed)}; use another --out")
    for name, adapter in adapters(model).items():
        adapter.load_state_dict(state["adapters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"]


# ---- after training ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_usage(model, data, seed):
    """Record how much each atom is used, on the training pictures at ten timesteps: what `keep_atoms` ranks by."""
    with record_usage(model):
        for t in sampling_timesteps(10).tolist():
            for i in range(len(data)):
                latents = data.latents[i : i + 1].to(data.text.dtype)
                noise = torch.randn(latents.shape, generator=generator(seed, 2, t, i)).to(latents)
                timesteps = torch.full((1,), t, device=latents.device)
                noisy = add_noise(latents, noise, timesteps)
                length = int(data.text_mask[i].sum())
                model(noisy, timesteps, data.text[i : i + 1, :length], data.text_mask[i : i + 1, :length])


def plot_losses(losses, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 20)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))
    ]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, alpha=0.25, label="each step")
    axes.plot(smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="squared error of the noise", title="training loss", yscale="log")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def write_csv(losses, path):
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss"])
        rows.writerows((step, f"{loss:.6f}") for step, loss in enumerate(losses))


# ---- the command ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m dit.finetune", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--images", nargs="+", required=True, help="a folder of pictures, or files; captions in name.txt beside them")
    add("--prompt", help="caption of all pictures, instead of files")
    add("--method", choices=METHODS, default="sparse")
    add("--atoms", type=int, help="M, the atoms beside each attention")
    add("--density", type=float, help="ρ, the share of atoms that a token uses")
    add("--threshold", choices=("top_k", "soft", "relu"), default="top_k")
    add("--lam", type=float, help="λ of --threshold soft or relu")
    add("--order", choices=("before", "after"), default="before", help="σ before the attention mixes (§3.4) or after")
    add("--target", default="attn1", help="regular expression for the attentions to adapt")
    add("--epochs", type=int)
    add("--repeats", type=int, help="how often an epoch visits each picture")
    add("--batch-size", type=int)
    add("--gradient-accumulation", type=int, default=1, help="batches for each step of the optimizer")
    add("--lr", type=float)
    add("--resolution", type=int, help="side of the training pictures in pixels")
    add("--random-flip", action="store_true", help="train on mirror images as well")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder for the results (runs/NAME)")
    add("--validation-prompt", nargs="+", default=[], help="more prompts to draw before and after")
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--resume", action="store_true", help="go on with the run in --out")
    return parser.parse_args(argv)


def complete(args, defaults):
    """Fill in what the user left open, from the model's defaults.json and then the paper's."""
    for name, value in {**DEFAULTS, **defaults.get("finetune", {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("epochs", "repeats", "batch_size", "gradient_accumulation", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr is {args.lr}; give a number above 0")
    args.out = args.out or Path("runs") / Path(args.images[0]).resolve().stem


def check_out(out, resume):
    """Refuse a folder that holds anything of somebody else's, or a run that --resume does not go on with."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    present = {f.name for f in out.iterdir() if not f.name.startswith(".")} if out.exists() else set()
    if foreign := sorted(present - OUTPUTS):
        raise UserError(f"--out {out} holds other files ({foreign[0]}); name a new or empty folder")
    if present and not resume:
        raise UserError(f"--out {out} holds a run already; add --resume to go on with it, or name another folder")
    if "adapter.safetensors" in present and "checkpoint.pt" not in present:
        raise UserError(f"--out {out} holds a finished run; name another folder, or remove it to train again")


def method_options(args):
    if args.method != "sparse":
        return {}
    how_sparse = {"density": args.density} if args.threshold == "top_k" else {"lam": args.lam}
    return {"atoms": args.atoms, "threshold": args.threshold, "order": args.order, **how_sparse}


def draw(pipe, prompts):
    """Rows of pictures, one seed for each column."""
    noise = pipe.noise(SEEDS)
    return [pipe.generate([prompt] * len(SEEDS), latents=noise) for prompt in prompts]


def finetune(pipe, args):
    """The whole run: encode, free, train, save, draw. Returns the path of before_after.png."""
    data = load_dataset(pipe, args.images, args.prompt, args.resolution, args.random_flip)
    prompts = list(dict.fromkeys(data.captions))[: len(SEEDS)] + args.validation_prompt
    pipe.encode_prompt(["", *prompts])  # remembered, so that T5 can go
    pipe.free("text_encoder", "vae")

    model = pipe.transformer
    model.gradient_checkpointing = args.gradient_checkpointing
    torch.manual_seed(args.seed)
    attach(model, args.method, args.target, **method_options(args))
    before = [] if parallel.rank() else draw(pipe, prompts)  # a fresh adapter is silent: this is the base model
    pipe.free("vae")
    losses = train(model, data, args, args.out / "checkpoint.pt")
    if parallel.rank():
        return None
    if args.method == "sparse":
        measure_usage(model, data, args.seed)
    note = {"seed": args.seed, "steps": len(losses), "epochs": args.epochs, "lr": args.lr}
    save_adapter(model, args.out / "adapter.safetensors", prompt=data.captions[0], **note)
    write_csv(losses, args.out / "training.csv")
    plot_losses(losses, args.out / "loss.png")
    after = draw(pipe, prompts)
    rows = [("training pictures", to_pil(data.images[: len(SEEDS)]))]
    for prompt, base, adapted in zip(prompts, before, after):
        rows += [(f"before: {prompt}", base), (f"after: {prompt}", adapted)]
    save_picture(grid(rows), args.out / "before_after.png")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    return args.out / "before_after.png"


def main():
    args = parse()
    pipe = load_pipeline(args)
    complete(args, pipe.defaults)
    check_out(args.out, args.resume)
    parallel.start()
    picture = finetune(pipe, args)
    if picture:
        count = sum(p.numel() for p in trainable(pipe.transformer))
        total = sum(p.numel() for p in pipe.transformer.parameters())
        print(f"trained {count:,} of {total:,} parameters; look at {picture}")


if __name__ == "__main__":
    run(main)
