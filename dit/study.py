"""A study: train every method on every subject, draw every prompt, score the pictures (§4.3, §4.4).

    study = Study(pipe, subjects, StudyConfig(epochs=30), "runs/study", clip=CLIP("weights/tiny/clip"))
    jobs = study.jobs(study.tune())
    study.run(jobs)

Each job leaves a result and an adapter in the folder. Finished jobs are skipped, and `torchrun` divides the rest among
its processes.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dit import parallel
from dit.diffusion import sampling_timesteps
from dit.dreambooth import Subject
from dit.metrics import alignment, fidelity, vendi_score
from dit.pictures import open_picture, save_picture, square
from dit.train import Diverged, TrainConfig, teach
from sparsecode import adapters, attach, detach, load_adapter, trainable
from sparsecode.attach import METHODS
from sparsecode.common import NUMBER, TEXT, UserError, read_json, remove_leftovers, replacing

SCORES = ("alignment", "diversity", "fidelity", "image_reward")  # image_reward only with an ImageReward model
SHOWN = 7  # pictures of a setting in pictures.png

# The scores of Tables 1 and 2; Table 2 is at ρ = 0.01 and has no ImageReward.
PAPER = {
    ("lora", None, None): (0.218, 4.707, 0.711, 0.220),
    ("dora", None, None): (0.213, 4.540, 0.712, 0.142),
    ("oft", None, None): (0.190, 3.926, 0.663, 0.137),
    ("sparse", 256, 0.02): (0.235, 5.205, 0.702, 0.182),
    ("sparse", 256, 0.04): (0.231, 5.172, 0.713, 0.431),
    ("sparse", 16, 0.01): (0.248, 5.867, 0.547),
    ("sparse", 256, 0.01): (0.249, 4.341, 0.650),
    ("sparse", 1024, 0.01): (0.241, 3.733, 0.672),
    ("sparse", 2048, 0.01): (0.238, 3.525, 0.692),
}


@dataclass(frozen=True)
class StudyConfig:
    """What a study varies, and the settings that all its jobs share. The defaults are the paper's.

    Sparse adapters are trained at each density with the first number of atoms, and at each number of atoms with the
    first density. With several `lrs`, each method uses the best one on the subjects `tune_on`, which the table omits.
    """

    methods: tuple = tuple(METHODS)
    densities: tuple = (0.02, 0.04)
    atoms: tuple = (256,)
    lrs: tuple = (1e-4,)
    tune_on: tuple = ()  # names of subjects
    seeds: tuple = (0,)  # of training
    epochs: int = 15
    pictures: int = 5  # of each prompt
    steps: int = 20  # of the sampler
    guidance: float | None = None
    gradient_checkpointing: bool = False

    def settings(self):
        """All settings without duplicates, the base model first."""
        sparse = [(self.atoms[0], density) for density in self.densities]
        sparse += [(atoms, self.densities[0]) for atoms in self.atoms[1:]]
        found = [Setting("base")]
        for method in self.methods:
            found += [Setting(method, *pair) for pair in sparse] if method == "sparse" else [Setting(method)]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Setting:
    """A method with the options that a study varies; "base" is the model without adapter."""

    method: str
    atoms: int | None = None
    density: float | None = None

    @classmethod
    def of(cls, record):
        return cls(record["method"], record["atoms"], record["density"])

    @property
    def options(self):
        return {"atoms": self.atoms, "density": self.density} if self.method == "sparse" else {}

    @property
    def paper(self):
        return PAPER.get((self.method, self.atoms, self.density))

    def __str__(self):
        return f"sparse, M {self.atoms}, ρ {self.density:g}" if self.method == "sparse" else self.method


@dataclass
class Job:
    """One training, all its pictures, and their scores."""

    setting: Setting
    subject: Subject
    lr: float | None
    seed: int | None

    @property
    def name(self):
        s = self.setting
        parts = [self.subject.name, s.method, *(f"{value:g}" for value in s.options.values())]
        return "-".join(parts if s.method == "base" else [*parts, f"lr{self.lr:g}", f"seed{self.seed}"])


class Study:
    """A folder of results, and what adds to it: a pipeline, subjects, a config, and the models that score.

    Diversity is measured with `dino` if given, else with `clip`. Without `image_reward`, that score is left out.
    """

    def __init__(self, pipe, subjects, config, folder, *, clip, dino=None, image_reward=None):
        self.pipe, self.subjects, self.config, self.folder = pipe, subjects, config, Path(folder)
        self.clip, self.dino, self.image_reward = clip, dino, image_reward
        self.scores = SCORES if image_reward else SCORES[:3]

    def check(self):
        """UserError for invalid settings (each is attached once) or too many steps, before hours of work."""
        sampling_timesteps(self.config.steps, self.pipe.schedule)
        for setting in self.config.settings()[1:]:
            attach(self.pipe.transformer, setting.method, **setting.options)
            detach(self.pipe.transformer)

    def sweep(self):
        """Remove what a killed study left behind: partly written files, and checkpoints of finished trainings."""
        for folder in (self.folder, self.folder / "results", self.folder / "adapters"):
            remove_leftovers(folder)
        for file in (self.folder / "adapters").glob("*.pt"):
            if file.with_suffix(".safetensors").exists():
                file.unlink()

    # ---- planning -----------------------------------------------------------------------------------------------

    def tune(self):
        """{method: learning rate}, the best one at the method's first setting on the subjects `tune_on`."""
        config, firsts = self.config, {}
        for setting in config.settings()[1:]:
            firsts.setdefault(setting.method, setting)
        if len(config.lrs) == 1:
            return dict.fromkeys(firsts, config.lrs[0])
        held_out = [subject for subject in self.subjects if subject.name in config.tune_on]
        tries = {(method, lr): [Job(setting, subject, lr, config.seeds[0]) for subject in held_out]
                 for method, setting in firsts.items() for lr in config.lrs}  # fmt: skip
        self.run([job for jobs in tries.values() for job in jobs], "tuning", may_diverge=True)
        worth = {key: statistics.mean(map(self.worth, jobs)) for key, jobs in tries.items()}
        rates = {method: max(config.lrs, key=lambda lr: worth[method, lr]) for method in firsts}
        if parallel.rank() == 0:
            for method, best in rates.items():
                tried = ", ".join(f"{lr:g}: {worth[method, lr]:.3f}" for lr in config.lrs)
                names = ", ".join(config.tune_on)
                print(f"{method}: learning rate {best:g} (alignment + fidelity on {names}: {tried})")
        return rates

    def jobs(self, rates):
        """Every job of the table, with these learning rates."""
        base, *adapted = self.config.settings()
        counted = [subject for subject in self.subjects if subject.name not in self.config.tune_on]
        jobs = [Job(base, subject, None, None) for subject in counted]
        return jobs + [Job(setting, subject, rates[setting.method], seed)
                       for seed in self.config.seeds for subject in counted for setting in adapted]  # fmt: skip

    # ---- running ------------------------------------------------------------------------------------------------

    def file(self, job, suffix="json"):
        return self.folder / "results" / f"{job.name}.{suffix}"

    def record(self, job):
        required = {"subject": TEXT, "method": TEXT, "parameters": NUMBER, "checksum": NUMBER}
        optional = dict.fromkeys(("atoms", "density", "lr", "seed", *self.scores), NUMBER)
        record = read_json(self.file(job), required, optional)
        return {name: record.get(name) for name in ("subject", "method", *optional, "parameters", "checksum")}

    def worth(self, job):
        """The criterion for a learning rate: alignment + fidelity, or −∞ if training diverged."""
        record = self.record(job)
        return -math.inf if record["alignment"] is None else record["alignment"] + record["fidelity"]

    def is_done(self, job, may_diverge):
        if not self.file(job).exists():
            return False
        record = self.record(job)
        if record["checksum"] != job.subject.checksum():
            raise UserError(f"{self.file(job)} is a result of other pictures, captions or prompts "
                            f"of {job.subject.name}; use another --out")  # fmt: skip
        diverged = record["alignment"] is None
        return may_diverge if diverged else all(record[score] is not None for score in self.scores)

    def run(self, jobs, title="customization", may_diverge=False):
        """Run the jobs that are not done; each process takes its share."""
        todo = [job for job in jobs if not self.is_done(job, may_diverge)]
        parallel.wait()  # until all have this list: a finished job changes it
        share = todo[parallel.rank() :: parallel.world_size()]
        bar = tqdm(share, title, disable=parallel.bar_off())
        with parallel.alone():
            for job in bar:
                self.do(job, may_diverge)
        parallel.wait()

    def do(self, job, may_diverge):
        model, setting = self.pipe.transformer, job.setting
        record = {"subject": job.subject.name, "method": setting.method, "atoms": setting.atoms,
                  "density": setting.density, "lr": job.lr, "seed": job.seed, "parameters": 0,
                  "checksum": job.subject.checksum()}  # fmt: skip
        try:
            if setting.method != "base":
                self.teach(job)
                record["parameters"] = sum(p.numel() for p in trainable(model))
            pictures = self.draw(job.subject.prompts)
            self.save_strip(job, pictures)
            record |= self.score(job.subject, pictures)
        except Diverged:
            if not may_diverge:
                raise
            record |= dict.fromkeys(self.scores)
        finally:
            if adapters(model):
                detach(model)
        with replacing(self.file(job)) as temporary:
            temporary.write_text(json.dumps(record) + "\n")

    def teach(self, job):
        """Train the job's adapter, unless its file exists, and load it."""
        file = self.folder / "adapters" / f"{job.name}.safetensors"
        config = TrainConfig.of(self.pipe, method=job.setting.method, **job.setting.options, lr=job.lr, seed=job.seed,
                                epochs=self.config.epochs,
                                gradient_checkpointing=self.config.gradient_checkpointing)  # fmt: skip
        teach(self.pipe, job.subject.files, job.subject.captions, file, config)
        load_adapter(self.pipe.transformer, file)

    def draw(self, prompts):
        """`pictures` pictures of each prompt, from the same noise for every job."""
        config = self.config
        every = [prompt for prompt in prompts for _ in range(config.pictures)]
        noise = self.pipe.noise(range(len(every)))  # (n, 4, h, w)
        return self.pipe.generate(every, latents=noise, steps=config.steps, guidance=config.guidance)

    def score(self, subject, pictures):
        texts = [text for text in subject.texts for _ in range(self.config.pictures)]
        seen, read = self.clip.images(pictures), self.clip.texts(texts)  # (n, C), (n, C)
        originals = self.clip.images([square(open_picture(f), self.pipe.resolution) for f in subject.files])  # (m, C)
        different = self.dino.images(pictures) if self.dino else seen
        scores = [alignment(seen, read), vendi_score(different), fidelity(seen, originals)]
        if self.image_reward:
            scores.append(self.image_reward.scores(texts, pictures).mean().item())
        return dict(zip(SCORES, scores))

    def save_strip(self, job, pictures):
        """Save one picture for each of up to SHOWN prompts, side by side, for pictures.png."""
        strip = np.concatenate([np.asarray(picture) for picture in spread(pictures[:: self.config.pictures])], axis=1)
        save_picture(Image.fromarray(strip), self.file(job, "png"))


def spread(items):
    """Up to SHOWN of the items, evenly spaced."""
    return items[:: math.ceil(len(items) / SHOWN)]
