"""How fast is this beside diffusers and peft? Both take turns in one run, so that a busy machine slows both.

    python tests/benchmarks/against_diffusers.py          (a few minutes on two idle CPU cores, 10 GB of memory)

Prints: 16 pictures of the tiny model; a guided forward of the real size, and what share of a matrix product's own speed
it reaches; a training step of LoRA; the price of the sparse adapter on one attention; the memory that loading T5 takes.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from dit.checkpoint import load_text_encoder, save_part
from dit.config import T5Config, TransformerConfig
from dit.pipeline import Pipeline
from dit.t5 import T5Encoder
from dit.transformer import PixArtTransformer
from sparsecode import Attention, attach, trainable

TINY = Path(__file__).parents[2] / "weights" / "tiny"


def take_turns(*functions, rounds):
    """The median time of each function in seconds, after one round that does not count."""
    times = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, spent in zip(functions, times):
            start = time.perf_counter()
            function()
            spent += [time.perf_counter() - start] if turn else []
    return [statistics.median(spent) for spent in times]


def report(what, ours, theirs, more=""):
    print(f"{what:<62} {ours:8.3f} s  theirs {theirs:8.3f} s  {theirs / ours:5.2f} times as fast{more}", flush=True)


def pictures(rounds):
    ours, prompts = Pipeline.from_folder(TINY, torch.float32, "cpu"), ["a fox on a striped blue background"] * 16
    theirs = PixArtSigmaPipeline.from_pretrained(TINY)
    theirs.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=20, guidance_scale=3.0, height=64, width=64, use_resolution_binning=False,
                   clean_caption=False)  # fmt: skip
    ours_s, theirs_s = take_turns(lambda: ours.generate(prompts, steps=20, guidance=3.0),
                                  lambda: theirs(prompts, **options), rounds=rounds)  # fmt: skip
    report("16 pictures of the tiny model in 20 steps", ours_s, theirs_s)


def transformers_of(blocks):
    """Ours and diffusers' transformer of the real width with random weights, and inputs of a guided forward at 256²."""
    config = TransformerConfig(num_layers=blocks, sample_size=32, interpolation_scale=0.5)
    theirs = PixArtTransformer2DModel(num_layers=blocks, sample_size=32, interpolation_scale=0.5,
                                      cross_attention_dim=1152, caption_channels=4096,
                                      use_additional_conditions=False)  # fmt: skip
    inputs = torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.randn(2, 20, 4096), torch.ones(2, 20)
    return PixArtTransformer(config).requires_grad_(False), theirs.requires_grad_(False), inputs


def run_theirs(model, latents, timesteps, text, mask):
    return model(latents, text, timesteps, encoder_attention_mask=mask, return_dict=False)[0]


@torch.no_grad()
def guided_forward(blocks, rounds):
    ours, theirs, inputs = transformers_of(blocks)
    with FlopCounterMode(display=False) as counter:
        ours(*inputs)
    a, b = torch.randn(512, 1152), torch.randn(1152, 4608)  # what the widest layer multiplies
    product, ours_s, theirs_s = take_turns(lambda: a @ b, lambda: ours(*inputs), lambda: run_theirs(theirs, *inputs),
                                           rounds=rounds)  # fmt: skip
    share = counter.get_total_flops() / ours_s / (2 * 512 * 1152 * 4608 / product)
    report(f"a guided forward of {blocks} real blocks, 256², 20 tokens", ours_s, theirs_s, f", {share:.0%} of a @ b")


def training_step(blocks, rounds):
    ours, theirs, inputs = transformers_of(blocks)
    attach(ours, "lora", r=16)
    inject_adapter_in_model(LoraConfig(r=16, target_modules=r".*attn1\.(to_q|to_k|to_v|to_out\.0)"), theirs)
    weights = trainable(ours), [weight for weight in theirs.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in weights[0]) == sum(weight.numel() for weight in weights[1])

    def step(run, optimizer):
        optimizer.zero_grad()
        run().square().mean().backward()
        optimizer.step()

    ours_s, theirs_s = take_turns(
        lambda adam=torch.optim.AdamW(weights[0]): step(lambda: ours(*inputs), adam),
        lambda adam=torch.optim.AdamW(weights[1]): step(lambda: run_theirs(theirs, *inputs), adam), rounds=rounds,
    )  # fmt: skip
    report(f"a training step of LoRA on {blocks} real blocks, against peft", ours_s, theirs_s)


@torch.no_grad()
def price_of_the_adapter(tokens, rounds):
    plain, adapted = (torch.nn.ModuleDict({"attn1": Attention(1152, 16)}) for _ in range(2))
    for adapter in attach(adapted, "sparse", atoms=256, density=0.02):
        torch.nn.init.normal_(adapter.D)  # one of zeros would be left out
    x = torch.randn(1, tokens, 1152)
    base_s, adapted_s = take_turns(lambda: plain["attn1"](x), lambda: adapted["attn1"](x), rounds=rounds)
    what = f"the sparse adapter on one attention of {tokens} tokens"
    print(f"{what:<62} {adapted_s / base_s:8.2f} times the time")


def memory_of_loading(layers):
    """In a process of its own: the peak while T5-XXL's first layers are read, as a multiple of their size in memory."""
    with tempfile.TemporaryDirectory() as folder:
        save_part(T5Encoder(T5Config(num_layers=layers)), folder)
        done = subprocess.run([sys.executable, __file__, "--load", folder], capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split())
    what = f"memory to load {layers} layers of T5-XXL in bfloat16"
    print(f"{what:<62} {peak / size:8.2f} times its {size / 1e9:.1f} GB")


def load(folder):
    def memory(field):
        return 1024 * int(re.search(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = memory("VmRSS")
    encoder = load_text_encoder(folder, torch.bfloat16)
    print(memory("VmHWM") - before, 2 * sum(weight.numel() for weight in encoder.parameters()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn")
    parser.add_argument("--blocks", type=int, default=28, help="of the guided forward")
    parser.add_argument("--t5-layers", type=int, default=4, help="of 24; the file is written in float32")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, median of {args.rounds} rounds")
    pictures(args.rounds)
    guided_forward(args.blocks, args.rounds)
    training_step(min(6, args.blocks), args.rounds)
    for tokens in (256, 1024, 4096):
        price_of_the_adapter(tokens, args.rounds)
    memory_of_loading(args.t5_layers)


if __name__ == "__main__":
    main()
