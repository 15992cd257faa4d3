"""How well does the default fine-tuning learn one picture? Every shipped subject picture, ten seeds each.

    python tests/benchmarks/one_picture.py --out runs/one_picture          (about 2.5 minutes on two CPU cores)

For each picture: what `python -m dit.finetune` trains, with its own caption and the shipped defaults; then the PSNR of
ten generated pictures to it, and how often the nearest of all subject pictures is the one that was trained on. A
picture whose adapter is in --out already is not trained again.
"""

import argparse
from pathlib import Path

import torch

from dit.cli import TINY
from dit.data import find_captions, load_images
from dit.pictures import to_tensor
from dit.pipeline import Pipeline
from dit.train import TrainConfig, teach
from sparsecode import detach, load_adapter

SUBJECTS = Path(__file__).parent.parent.parent / "lessons" / "data" / "subjects"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--weights", type=Path, default=TINY)
    parser.add_argument("--epochs", type=int, nargs="*", default=[], help="instead of the model's default")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()

    pipe = Pipeline.from_folder(args.weights)
    files = sorted(SUBJECTS.glob("*/*.png"))
    captions = find_captions(files)
    images = load_images(files, pipe.resolution)  # (25, 3, H, W)
    noise = pipe.noise(range(args.seeds))  # (seeds, 4, h, w)
    for epochs in args.epochs or [None]:
        mean, share = [], []
        for i, (file, caption) in enumerate(zip(files, captions)):
            adapter = args.out / f"{file.parent.name}-{file.stem}-{epochs or 'default'}.safetensors"
            teach(pipe, [file], [caption], adapter, TrainConfig.of(pipe, epochs=epochs))
            load_adapter(pipe.transformer, adapter)
            drawn = to_tensor(pipe.generate([caption] * args.seeds, latents=noise))  # (seeds, 3, H, W)
            detach(pipe.transformer)
            error = ((drawn[:, None] - images) / 2).square().mean((2, 3, 4))  # (seeds, 25)
            psnr = -10 * error[:, i].log10()  # (seeds,)
            nearest = (error.argmin(1) == i).float()  # (seeds,)
            mean.append(psnr.mean().item())
            share.append(nearest.mean().item())
            print(f"{file.parent.name}/{file.stem} {mean[-1]:6.2f} dB  nearest {share[-1]:.0%}", flush=True)
        total = torch.tensor(mean)
        print(f"epochs {epochs or 'default'}, {len(files)} pictures × {args.seeds} seeds: mean {total.mean():.2f} dB, "
              f"worst picture {total.min():.2f}; nearest to its own {sum(share) / len(share):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
