"""Fine-tuning: attach adapters to the frozen transformer, predict the noise in the pictures, step on the adapters.

    config = TrainConfig.of(pipe, epochs=20)                     what a run is
    losses = train(pipe, encode(pipe, images, captions), config)

`train` is the loop. `fit` is a whole run around it, from pictures to an adapter file, and goes on after a kill.
"""

import math
import zlib
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit import parallel
from dit.came import CAME
from dit.data import encode, load_images
from dit.diffusion import add_noise, noise_error, sampling_timesteps
from sparsecode import (
    adapters,
    attach,
    detach,
    load_adapter,
    orthogonality,
    read_header,
    record_usage,
    save_adapter,
    trainable,
)
from sparsecode.common import COUNT, POSITIVE, Kind, UserError, check_fields, replacing

OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, weight_decay=0.0), "came": CAME}
HOLD = 100  # steps
SCHEDULES = {  # the share of the learning rate at a step
    "constant": lambda step: 1.0,
    # Held, then falling as 1/step²: its sum, which is what harms other captions, stays below 2 HOLD.
    "inverse-square": lambda step: min(1.0, (HOLD / (step + 1)) ** 2),
}

SCHEDULE = Kind(f"one of {', '.join(SCHEDULES)}", lambda value: value in tuple(SCHEDULES))
DEFAULTS = {  # what a model's defaults.json may say of fine-tuning
    **dict.fromkeys(("epochs", "repeats", "batch_size", "atoms", "resolution"), COUNT),
    **dict.fromkeys(("lr", "density"), POSITIVE),
    "lr_schedule": SCHEDULE,
}


class Diverged(UserError):
    """The loss became NaN or infinite."""


# ---- what a run is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """All that decides what comes out of a run, but for weights and pictures. The defaults are the paper's (§4.3)."""

    method: str = "sparse"
    target: str = "attn1"  # regular expression for the attentions to adapt
    options: dict = field(default_factory=dict)  # of the method, as `attach` takes them: atoms, density, …; r, alpha
    start: str | None = None  # adapter file to begin with, in place of fresh adapters; it decides the three above
    epochs: int = 15
    repeats: int = 10  # how often an epoch visits each picture
    batch_size: int = 1  # of each process
    gradient_accumulation: int = 1  # batches for each step of the optimizer
    optimizer: str = "adamw"
    lr: float = 1e-4
    lr_schedule: str = "constant"
    orthogonality: float = 0.0  # weight of the penalty on atoms that are alike (Appendix A)
    resolution: int = 1024  # side of the training pictures in pixels
    random_flip: bool = False  # train on mirror images as well
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile: minutes at the start, faster steps on a GPU
    seed: int = 0

    @classmethod
    def of(cls, pipe, **given):
        """A config for a model: what is `given` and not None, then the model's defaults.json, then the paper's.

        Names that are no field, like atoms=64 or r=4, are options of the method. With `start` the file decides them.
        """
        given = {name: value for name, value in given.items() if value is not None}
        defaults = {"atoms": 256, "density": 0.02, "resolution": pipe.resolution, **model_defaults(pipe)}
        if given.get("optimizer") == "came":
            defaults.pop("lr", None)  # a model's own is for AdamW, whose steps are shorter
        names = {f.name for f in fields(cls)}
        start = given.get("start")
        if start is not None:
            header = read_header(start)
            if fixed := [name for name in given if name in ("method", "target") or name not in names]:
                raise UserError(f"{start} decides {', '.join(fixed)} already; leave it out")
            given |= {"start": str(start), "method": header["method"], **header["options"]}
            given.pop("target_modules", None)  # of peft's layout
        method, options = given.get("method", cls.method), {k: v for k, v in given.items() if k not in names}
        if method != "sparse" and given.get("orthogonality"):
            raise UserError(f"{method} has no atoms, so orthogonality has no meaning; leave it out")
        if method == "sparse" and start is None:
            own = ("atoms", "density") if options.get("threshold", "top_k") == "top_k" else ("atoms",)
            if "density" not in own and "density" in options:
                raise UserError(f"threshold {options['threshold']} does not use a density but lam; leave it out")
            options = {name: defaults[name] for name in own} | options
        chosen = {k: v for k, v in {**defaults, **given}.items() if k in names}
        config = cls(**{**chosen, "options": options})
        if config.resolution % pipe.multiple:
            raise UserError(f"resolution {config.resolution} is not a multiple of {pipe.multiple} pixels")
        return config

    def attach(self, model):
        """Fresh adapters, or those of the file to start from."""
        torch.manual_seed(self.seed)
        if self.start:
            load_adapter(model, self.start)
        else:
            attach(model, self.method, self.target, **self.options)


def model_defaults(pipe):
    """What the defaults.json of a model says of fine-tuning; UserError for what cannot be."""
    return check_fields(pipe.defaults.get("finetune") or {}, {}, DEFAULTS, f"{pipe.folder}/defaults.json: finetune")


# ---- the loop ---------------------------------------------------------------------------------------------------


def visiting_order(n, epochs, repeats, seed):
    """Which picture each visit goes to, (epochs · repeats · n,): every epoch a new order of `repeats` times all n."""
    orders = [np.random.default_rng([seed, 0, e]).permutation(n * repeats) % n for e in range(epochs)]
    return np.concatenate(orders)


def training_loss(pipe, data, order, visits, seed):
    """Mean squared error of the predicted noise over B visits, each with a flip, a timestep and noise of its own.

    These depend on the seed and the number of the visit alone. So they stay the same in a run that goes on after a
    kill, and however the visits are spread over batches and processes.
    """
    device, dtype = data.text.device, data.text.dtype
    draws = [np.random.default_rng([seed, 1, visit]) for visit in visits]
    flip = torch.tensor([rng.random() < 0.5 for rng in draws], device=device)  # (B,)
    timesteps = [int(rng.integers(pipe.schedule.num_train_timesteps)) for rng in draws]
    timesteps = torch.tensor(timesteps, device=device)  # (B,)
    noise = np.stack([rng.standard_normal(data.latents.shape[1:], dtype=np.float32) for rng in draws])
    noise = torch.from_numpy(noise).to(device)  # (B, 4, h, w)
    picks = torch.from_numpy(order[list(visits)]).to(device)  # (B,)
    latents = data.latents[picks]  # (B, 4, h, w)
    if data.mirrored is not None:
        latents = torch.where(flip[:, None, None, None], data.mirrored[picks], latents)

    def predict(noisy, *rest):
        return pipe.transformer(noisy.to(dtype), *rest)

    text, mask = data.text[picks], data.text_mask[picks]
    return noise_error(predict, latents, timesteps, noise, text, mask, pipe.schedule).mean()


def train(pipe, data, config, checkpoint=None):
    """Attach adapters to the transformer of `pipe` and train them on `data`; returns the loss of every step.

    With a checkpoint the run begins where that stands. It is written again once the weights have proved good, by a
    finite loss, and after the last step in any case.
    """
    model = pipe.transformer
    config.attach(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        model.compile()
    parameters = trainable(model)
    optimizer = OPTIMIZERS[config.optimizer](parameters, lr=config.lr)
    losses = checkpoint.restore(model, optimizer) if checkpoint else []

    order = visiting_order(len(data), config.epochs, config.repeats, config.seed)
    per_step = config.batch_size * config.gradient_accumulation * parallel.world_size()
    steps = math.ceil(len(order) / per_step)
    order = np.resize(order, steps * per_step)  # begins again, so that the last step is as full as the others
    bar = tqdm(range(len(losses), steps), "training", steps, initial=len(losses), disable=parallel.bar_off())
    for step in bar:
        visits = range(step * per_step, (step + 1) * per_step)[parallel.rank() :: parallel.world_size()]
        for group in optimizer.param_groups:
            group["lr"] = config.lr * SCHEDULES[config.lr_schedule](step)
        optimizer.zero_grad()
        total = torch.zeros(1, device=data.text.device)
        for start in range(0, len(visits), config.batch_size):
            batch = visits[start : start + config.batch_size]
            loss = training_loss(pipe, data, order, batch, config.seed) / config.gradient_accumulation
            loss.backward()
            total += loss.detach()
        if config.orthogonality:
            (config.orthogonality * orthogonality(model)).backward()
        parallel.average([total, *(p.grad for p in parameters)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (math.isfinite(total) and math.isfinite(norm)):
            there = checkpoint and checkpoint.file.exists()
            kept = f"{checkpoint.file} keeps an earlier step" if there else "nothing was kept"
            raise Diverged(f"the loss became {total.item()} at step {step}; {kept}; try a smaller lr than {config.lr}")
        if checkpoint and step > 0 and step % checkpoint.every == 0:
            checkpoint.save(model, optimizer, losses)
        optimizer.step()
        losses.append(total.item())
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}", refresh=False)
    if checkpoint:
        checkpoint.save(model, optimizer, losses)
    return losses


@torch.no_grad()
def measure_usage(pipe, data, seed):
    """Record how much each atom is used, on the training pictures at ten timesteps: what `keep_atoms` ranks by."""
    model, rng = pipe.transformer, np.random.default_rng([seed, 2])
    with record_usage(model):
        for t in sampling_timesteps(10, pipe.schedule):
            for latents, text, mask in zip(data.latents.split(1), data.text.split(1), data.text_mask.split(1)):
                noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)).to(latents)
                timesteps = t.view(1).to(latents.device)
                noisy = add_noise(latents, noise, timesteps, pipe.schedule)  # (1, 4, h, w)
                model(noisy.to(text.dtype), timesteps, text, mask)


# ---- stopped and resumed ----------------------------------------------------------------------------------------


class Checkpoint:
    """Where a run stands, in a file: adapters, optimizer, a loss for each step, and what the run is (`fingerprint`).

    UserError if the file is there but cannot be read, does not fit itself, or is that of another run.
    """

    def __init__(self, file, settings, every=100):
        self.file, self.settings, self.every = file, settings, every
        self.state = self._read() if file.exists() else None

    def _read(self):
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            then = dict(state["settings"])
            assert len(state["losses"]) == state["step"] and all(map(math.isfinite, state["losses"]))
        except Exception as error:  # torch raises many kinds
            reason = f"cannot be read as a checkpoint ({type(error).__name__})"
            raise UserError(f"{self.file} {reason}; remove it to start again") from None
        for name in {**then, **self.settings}:
            if then.get(name) != self.settings.get(name):
                option, now = f"--{name.replace('_', '-')}", self.settings.get(name)
                message = f"belongs to a run with {option} {then.get(name)}, not {now}; use another --out"
                raise UserError(f"{self.file} {message}")
        return state

    def restore(self, model, optimizer):
        """Put weights and moments in place, if there are any; returns the losses up to there."""
        if self.state is None:
            return []
        try:
            for name, adapter in adapters(model).items():
                adapter.load_state_dict(self.state["adapters"][name])
            optimizer.load_state_dict(self.state["optimizer"])
        except (KeyError, ValueError, RuntimeError):
            raise UserError(f"{self.file} does not fit the adapters here; remove it to start again") from None
        return self.state["losses"]

    def save(self, model, optimizer, losses):
        if parallel.rank() == 0:
            weights = {name: adapter.state_dict() for name, adapter in adapters(model).items()}
            state = {"adapters": weights, "optimizer": optimizer.state_dict(), "settings": self.settings}
            state |= {"step": len(losses), "losses": losses}
            try:
                with replacing(self.file) as temporary, open(temporary, "wb") as opened:
                    torch.save(state, opened)
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's, on a full disk
                reason = f"cannot be written ({type(error).__name__}); is the disk full?"
                raise UserError(f"{self.file} {reason} An earlier one is kept") from None


def fingerprint(pipe, images, captions, config):
    """What must be the same when a run goes on: {name: text}."""
    settings = asdict(config)
    settings |= settings.pop("options")
    settings["images"] = f"{len(images)} pictures, checksum {zlib.crc32(images.numpy().tobytes())}, captions {captions}"
    settings |= {"dtype": pipe.dtype, "nproc_per_node": parallel.world_size()}
    settings["weights"] = f"checksum {files_checksum(pipe.folder / 'transformer')}"  # not the path: folders are moved
    if start := settings.pop("start"):
        settings["from"] = f"checksum {files_checksum(start)}"
    return {name: str(value) for name, value in settings.items()}


def files_checksum(path):
    """Of a file, or of the files in a folder."""
    path, total = Path(path), 0
    names = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for name in names:
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                total = zlib.crc32(block, total)
    return total


# ---- a whole run ------------------------------------------------------------------------------------------------


def fit(pipe, images, captions, config, file, checkpoint):
    """Train on images (n, 3, H, W) and write the adapter to `file`. Returns the losses; the adapters stay attached.

    T5 and the autoencoder are freed before. The checkpoint file stays, so that what else the caller does with the run
    can be done again after a kill.
    """
    pipe.remember(["", *captions])
    data = encode(pipe, images, captions, config.random_flip)
    pipe.free("vae")
    losses = train(pipe, data, config, checkpoint)
    if parallel.rank() == 0:
        if config.method == "sparse":
            measure_usage(pipe, data, config.seed)
        notes = asdict(config)
        for said_elsewhere in ("method", "target", "options"):
            del notes[said_elsewhere]
        run = checksum(checkpoint.settings)
        save_adapter(pipe.transformer, file, prompt=captions[0], steps=len(losses), run=run, **notes)
    return losses


def checksum(settings):
    return zlib.crc32(repr(sorted(settings.items())).encode())


def teach(pipe, files, captions, file, config):
    """Fine-tune on picture files into an adapter file; the model is left as it was.

    A file that holds this very run is left alone, and a run that was killed goes on from its checkpoint beside it.
    """
    images = load_images(files, config.resolution)  # (n, 3, H, W)
    settings = fingerprint(pipe, images, captions, config)
    if file.exists():
        if read_header(file)["notes"].get("run") != checksum(settings):
            raise UserError(f"{file} was trained on other pictures or with other settings; use another --out")
        return
    checkpoint = Checkpoint(file.with_suffix(".pt"), settings)
    fit(pipe, images, captions, config, file, checkpoint)
    detach(pipe.transformer)
    checkpoint.file.unlink()  # now the run is finished
