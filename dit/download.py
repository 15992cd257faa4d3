"""Download the released PixArt-Σ, T5-XXL and autoencoder (about 21 GB) into one folder: `python -m dit.download`.

Needs the extra `hub`: pip install -e ".[hub]"
"""

from pathlib import Path

from dit.cli import Parser, run
from sparsecode.common import UserError

TRANSFORMERS = {
    256: "PixArt-alpha/PixArt-Sigma-XL-2-256x256",
    512: "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
    1024: "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}
TEXT_AND_VAE = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"


def main(argv=None):
    parser = Parser(prog="python -m dit.download", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, choices=TRANSFORMERS, default=1024, help="resolution of the transformer")
    parser.add_argument("--out", type=Path, help="folder (default: weights/pixart-sigma-SIZE)")
    args = parser.parse_args(argv)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError('huggingface_hub is not installed; run: pip install -e ".[hub]"') from None
    out = args.out or Path("weights") / f"pixart-sigma-{args.size}"
    try:
        parts = ["text_encoder/*", "tokenizer/*", "vae/*", "scheduler/*", "model_index.json"]
        snapshot_download(TEXT_AND_VAE, allow_patterns=parts, local_dir=out)
        snapshot_download(TRANSFORMERS[args.size], allow_patterns=["transformer/*", "scheduler/*"], local_dir=out)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"the download stopped ({str(error).splitlines()[0]}); run it again to go on") from None
    print(f"{out} is complete; use it with --weights {out}")


if __name__ == "__main__":
    run(main)
