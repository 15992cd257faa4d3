"""From noise and a sentence to a picture: PixArt-Σ, part by part.

Claim    A picture is drawn by asking one network, twenty times, "which part of this is noise?". The sentence enters
         through cross-attention alone, and one can see which patch of the picture looks at which word.
Paper    The base model of §4.1, and its attention, Eqs. 1–3. (PixArt-Σ: Chen et al., 2024.)
Modules  dit/pipeline.py, and what it joins: dit/t5.py, dit/transformer.py, dit/diffusion.py, dit/vae.py
Costs    6 seconds on two CPU cores, with --quick as well.

    python lessons/05_pixart.py
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dit.diffusion import alphas_sigmas, noise_error, sampling_timesteps
from dit.pictures import to_pil, to_tensor
from dit.pipeline import Pipeline, pad_rows
from dit.tiny.scenes import Scene, Thing, draw

WEIGHTS = Path(__file__).parent.parent / "weights" / "tiny"
FIGURES = Path(__file__).parent / "figures"
PROMPT = "a red star at the top left on a blue background"
ANOTHER = "a yellow heart in the middle on a purple background"


@torch.no_grad()
def main(quick=False, figures=FIGURES, weights=WEIGHTS):
    figures = Path(figures)
    figures.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_folder(weights, device="cpu")
    guidance = pipe.defaults.get("guidance", 4.5)

    # %% 1. The sentence: words -> numbers -> one vector for each token, which has read the whole sentence (T5)
    ids, mask = pipe.tokenizer([PROMPT])  # (1, 300) each, padded
    length = int(mask.sum())
    words = [pipe.tokenizer.pieces.id_to_piece(i).strip("▁") for i in ids[0, :length].tolist()]
    text = pipe.text_encoder(ids[:, :length], mask[:, :length])  # (1, L) -> (1, L, C_text)
    print(f"tokens       {ids[0, :length].tolist()} = {' '.join(words)}")
    print(f"text         {tuple(text.shape)}: one vector a token, from T5")

    # %% 2. By hand, with the oldest sampler, DDIM. In each step the transformer is asked twice, with the sentence and
    # with "", and what the sentence changes is exaggerated (classifier-free guidance). From x_t = α_t x_0 + σ_t ε comes
    # a guess of the clean latents x_0; the next x is that guess again with a little less of the same noise.
    (empty,), _ = pipe.encode_prompt([""])
    both, both_mask = pad_rows([empty, text[0]])  # (2, L, C_text), (2, L)
    alpha, sigma = alphas_sigmas(pipe.schedule)  # (1000,) each
    noise = pipe.noise([0])  # (1, 4, h, w)
    x, by_hand, times = noise, [], sampling_timesteps(50, pipe.schedule).tolist()  # 999, 979, …, 20
    for t, t_next in zip(times, [*times[1:], None]):
        output = pipe.transformer(torch.cat([x, x]), torch.full((2,), t), both, both_mask)  # (2, 8, h, w)
        eps_empty, eps_text = output[:, :4].chunk(2)  # (1, 4, h, w) each; channels 4–7 are a variance nobody needs
        eps = eps_empty + guidance * (eps_text - eps_empty)  # (1, 4, h, w)
        x0 = (x - sigma[t] * eps) / alpha[t]  # (1, 4, h, w)
        x = x0 if t_next is None else alpha[t_next] * x0 + sigma[t_next] * eps  # (1, 4, h, w)
        by_hand.append(x)
    print(f"noise        {tuple(noise.shape)} -> transformer {tuple(output.shape)} -> latents {tuple(x.shape)}")
    print(f"picture      {tuple(pipe.decode(x).shape)}, decoded by the VAE; guidance {guidance:g}")

    # %% 3. The library's sampler, DPM-Solver++(2M), also looks at the guess before. While it draws, hooks read the
    # cross-attention: A of Eq. 1 for the picture's tokens (rows) over the words (columns).
    maps = {block: [] for block in range(len(pipe.transformer.transformer_blocks))}

    def read(block):
        def hook(attention, inputs, _):
            image_tokens, text_tokens, token_mask = (part[-1:] for part in inputs)  # the half that has the sentence
            q, k, _ = attention.project(image_tokens, text_tokens)  # (1, H, N, C/H), (1, H, L, C/H)
            maps[block].append(attention.attention_map(q, k, token_mask)[0].mean(0))  # (1, H, N, L) -> (N, L)

        return hook

    blocks = pipe.transformer.transformer_blocks
    hooks = [block.attn2.register_forward_hook(read(i)) for i, block in enumerate(blocks)]
    steps = list(pipe.sample(noise, *pipe.encode_prompt([PROMPT]), steps=20, guidance=guidance))
    for hook in hooks:
        hook.remove()
    picture = pipe.decode(steps[-1][1])  # (1, 3, H, W)
    generated = pipe.generate([PROMPT], steps=20, seed=0)[0]  # the same in one line

    # %% 4. Does it come out?
    first = next(pipe.sample(noise, *pipe.encode_prompt([PROMPT]), steps=50, guidance=guidance))[1]  # (1, 4, h, w)
    step_difference = (by_hand[0] - first).abs().max().item()  # the first step of DPM-Solver++ is one of DDIM
    same_picture = torch.equal(to_tensor([generated]), to_tensor(to_pil(picture)))
    samplers_db = -10 * torch.log10(((pipe.decode(x) - picture) / 2).square().mean()).item()
    print(f"one step by hand and pipe.sample differ by {step_difference:.0e} (expect below 1e-4)")
    print(f"pipe.generate is the picture assembled by hand: {same_picture} (expect True)")
    print(f"50 steps of DDIM and 20 of DPM-Solver++: {samplers_db:.1f} dB PSNR to each other (expect about 47)")

    scene = Scene((Thing("star", "red", "large", "top left"),), "blue")
    latents = pipe.encode_images(to_tensor([draw(scene)]))  # (1, 4, h, w)
    n = 8 if quick else 32
    many = torch.randn(n, *latents.shape[1:], generator=torch.Generator().manual_seed(0))  # (n, 4, h, w)
    latents, t = latents.expand(n, -1, -1, -1), torch.full((n,), 500)  # (n, 4, h, w), (n,)
    prompts = [pipe.encode_prompt([prompt] * n) for prompt in (PROMPT, "", ANOTHER)]  # (n, L, C_text), (n, L) each
    errors = [noise_error(pipe.transformer, latents, t, many, *p, pipe.schedule).mean().item() for p in prompts]
    right, without, wrong = errors
    print(f"error of ε on a red star at t = 500: {right:.4f} with its caption, {without:.4f} without,", end=" ")
    print(f"{wrong:.4f} with another's (expect 0.002, 0.014, 0.07)")

    # %% 5. Who looks at which word. Of the steps the last ten, t ≤ 500, when the star has its shape; of the blocks all
    # but the first, which cannot tell star from background yet. On the star 'red', 'star' and 'left' are read. Most of
    # the background's attention goes to 'a', 'the', 'top' and the end token, hardly any to 'blue': in T5 each token has
    # read the whole sentence, so a map says which vector is used, not which word is meant.
    side = int(len(maps[0][0]) ** 0.5)  # the picture is side × side tokens
    red, _, blue = torch.nn.functional.adaptive_avg_pool2d(picture, side)[0].flatten(1)  # (N,) each
    on_star = red > blue  # (N,)
    late = {block: torch.stack(seen[len(seen) // 2 :]).mean(0) for block, seen in maps.items()}  # (N, L) each
    focus = [(late[b][on_star, 2].mean() / late[b][~on_star, 2].mean()).item() for b in late]  # of token 2, "star"
    print("the star's patches look at the word 'star' more than the others do, block by block:", end=" ")
    print(" ".join(f"{ratio:.1f}×" for ratio in focus), "(expect 0.3× in block 0, then 2× to 8×)")
    attention = torch.stack([late[b] for b in late if b > 0]).mean(0)  # (N, L)
    draw_denoising(pipe, noise, steps, figures / "05_denoising.png")
    draw_attention(picture, attention.T.unflatten(1, (side, side)), words, figures / "05_cross_attention.png")
    checks = {"step_difference": step_difference, "same_picture": same_picture, "samplers_db": samplers_db}
    return {**checks, "error_right": right, "error_without": without, "error_wrong": wrong, "focus": focus}


# %% The figures


def draw_denoising(pipe, noise, steps, path):
    """x_t as it goes into each step, over the guess of x_0 that comes out, in two lines of ten."""
    latents = torch.cat([noise, *(x for _, x, _ in steps[:-1])])  # (20, 4, h, w)
    rows = to_pil(pipe.decode(latents)), to_pil(pipe.decode(torch.cat([x0 for _, _, x0 in steps])))
    figure, axes = plt.subplots(4, 10, figsize=(8.6, 4.0), layout="constrained")
    for i, (t, _, _) in enumerate(steps):
        for row, images in enumerate(rows):
            axes[2 * (i // 10) + row, i % 10].imshow(images[i])
        axes[2 * (i // 10), i % 10].set_title(f"t = {t}", fontsize=9)
    for ax, label in zip(axes[:, 0], ["$x_t$", "guess\nof $x_0$"] * 2):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    finish(figure, axes, f"“{PROMPT}”, from noise in 20 steps", path)


def draw_attention(picture, attention, words, path):
    """For each word, how much each patch looks at it against the mean patch, over the grey picture."""
    grey, edge = to_pil(picture)[0].convert("L"), picture.shape[-1] - 0.5
    figure, axes = plt.subplots(2, 7, figsize=(8.6, 2.9), layout="constrained")
    axes.flat[0].imshow(to_pil(picture)[0])
    axes.flat[0].set_title("the picture", fontsize=10)
    plt.setp(axes.flat[len(words) + 1 :], visible=False)
    for ax, word, seen in zip(axes.flat[1:], words, attention):
        ax.imshow(grey, cmap="gray", vmin=0, vmax=255)
        ratio = (seen / seen.mean()).log2()  # (h/2, w/2)
        colours = ax.imshow(ratio, cmap="RdBu_r", alpha=0.75, vmin=-3, vmax=3, extent=(-0.5, edge, edge, -0.5))
        ax.set_title(word.replace("</s>", "(end)"), fontsize=10)
    bar = figure.colorbar(colours, ax=axes, ticks=[-3, 0, 3], shrink=0.8)
    bar.ax.set_yticklabels(["⅛", "mean", "8 ×"], fontsize=9)
    finish(figure, axes, "How much each patch looks at each word, against the mean patch", path)


def finish(figure, axes, title, path):
    plt.setp(axes, xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Try
# - guidance = 1: rounder stars, some with a broken tip; 10: white sparks around them; 20: ruins.
# - steps=5 in step 3: DPM-Solver++ still draws a star; with 5 for the 50 of step 2, so does DDIM,
#   but it has come less far: the two differ (31 dB) where they agreed.
# - "a teapot at the top left on a blue background": the tiny model has seen no teapot, and draws some lump there.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples, for a check")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the pictures")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.figures)
