# %% [markdown]
# # 5. From noise and a sentence to a picture
#
# **The question.** How does one network turn pure noise and a sentence into a picture? It is asked twenty times, "which
# part of this is noise?", and each time a little of that part is taken away:
#
# ![Five steps from noise to a strawberry, and what the model expects at each](figures/05_denoising.png)
#
# *Top: the picture on its way, at five of twenty steps. Bottom: the clean picture that the model expects at that step.
# No strawberry on blue was in the training pictures.*
#
# The network is **PixArt-Σ** (Chen et al., 2024), the model that the paper fine-tunes. Here it is small: 2.3 million
# parameters instead of 610 million, but every part is there. You need lesson [2](02_attention_as_dictionary.md) for
# attention. This lesson takes about 10 seconds on two CPU cores, 5 with `--quick`.

# %%
from pathlib import Path

import draw
import torch
from lesson import Lesson
from torch.nn.functional import adaptive_avg_pool2d, layer_norm, mse_loss, silu

from dit import Pipeline
from dit.diffusion import add_noise, alphas_sigmas, noise_error, sampling_timesteps
from dit.pictures import to_pil, to_tensor
from dit.pipeline import pad_rows
from dit.tiny import scenes
from dit.tiny.judge import captions_to_judge, load_judge, score

lesson = Lesson()
weights = Path(draw.__file__).parent.parent / "weights" / "tiny"
pipe = Pipeline.from_folder(weights, device="cpu")
model = pipe.transformer
for parameter in model.parameters():
    parameter.requires_grad = False  # nothing is trained here

# %% [markdown]
# ## Latents: the small picture that the network sees
#
# A picture of 64 × 64 pixels has 12,288 numbers. Most of them can be guessed from their neighbours, so the network does
# not work on pixels. An **autoencoder** has two halves, trained together: the **encoder** turns a picture into few
# numbers, the **decoder** turns them back. These few numbers are the **latent** of the picture. Here it has 4 channels
# of 16 × 16. (The autoencoder is a VAE, as in lesson [4](04_mnist_vae.md).)

# %%
scene = scenes.Scene((scenes.Thing("strawberry", "large", "top left"),), "blue")
prompt = "a strawberry at the top left on a blue background"
picture = to_tensor([scenes.draw(scene)])  # (1, 3, 64, 64), from -1 to 1
latent = pipe.encode_images(picture)  # (1, 4, 16, 16)
decoded = pipe.decode(latent)  # (1, 3, 64, 64)


def psnr(image, other):
    """Likeness of two pictures in dB: 20 dB is a mean error of 10 % of the range, 40 dB of 1 %."""
    return -10 * torch.log10(((image - other) / 2).square().mean()).item()


# %%
lesson.check("numbers in the picture for each one in the latent", picture.numel() / latent.numel(), (12, 12))
lesson.check("picture and decoded latent, PSNR in dB", psnr(picture, decoded), (30, 36), form=".1f")
figure = draw.latent(picture[0], latent[0], decoded[0])
lesson.show(figure, "05_latent", "A picture, its latent, and the decoded picture")

# %% [markdown]
# *The four channels are no colours, but they are still a small picture: the strawberry stays in its place.*
#
# ## What is trained: guess the noise
#
# Take a latent $x_0$ and add noise. The **timestep** $t$, from 0 to 999, says how much:
#
# $$x_t = α_t x_0 + σ_t ε, \qquad α_t^2 + σ_t^2 = 1$$
#
# $ε$ (epsilon) is noise: each number is drawn from a normal distribution. $α_t$ is the share of the picture and $σ_t$
# that of the noise. At $t = 0$ there is nearly no noise, at $t = 999$ nearly nothing else.
#
# The network gets $x_t$, $t$ and the sentence, and must guess $ε$. The loss is one line, the mean squared error:
#
# $$\lVert \mathrm{model}(x_t, t, \mathrm{text}) - ε \rVert^2$$
#
# That is all of the training: draw a picture, a timestep and noise at random, and take a step that lowers this loss.
# Who knows the noise knows the picture as well, because the first equation can be solved for it:
# $x_0 = (x_t - σ_t ε) / α_t$.
#
# **Predict:** from which of these five can the model still guess the strawberry?

# %%
alpha, sigma = alphas_sigmas(pipe.schedule)  # (1000,) each
text, mask = pipe.encode_prompt([prompt])  # (1, L, C_text), (1, L): see below
noise = pipe.noise([0])  # (1, 4, 16, 16)
rows, noisy, guesses = [], [], []
for t in (50, 250, 500, 750, 950):
    x = alpha[t] * latent + sigma[t] * noise  # (1, 4, 16, 16)
    epsilon = model(x, torch.tensor([t]), text, mask)[:, :4]  # (1, 4, 16, 16); channels 4 to 7 are not used
    loss = mse_loss(epsilon, noise)
    library = noise_error(model, latent, torch.tensor([t]), noise, text, mask, pipe.schedule)
    assert torch.allclose(loss, library, atol=1e-5)
    guess = (x - sigma[t] * epsilon) / alpha[t]  # (1, 4, 16, 16)
    noisy.append(pipe.decode(x))
    guesses.append(pipe.decode(guess))
    rows.append((t, alpha[t].item(), sigma[t].item(), loss.item(), psnr(guesses[-1], decoded)))

# %%
lesson.table(("t", "α", "σ", "loss", "guess of the picture, dB"), rows)
lesson.check("α² + σ², largest difference from 1", (alpha**2 + sigma**2 - 1).abs().max().item(), (0, 1e-6))
lesson.check("loss at t = 50, times that at t = 950", rows[0][3] / rows[-1][3], (500, 3000), form=",.0f")
titles = [f"t = {row[0]}" for row in rows]
figure = draw.picture_rows({"with\nnoise": to_pil(torch.cat(noisy)), "guess": to_pil(torch.cat(guesses))}, titles)
lesson.show(figure, "05_noise", "The strawberry with more and more noise, and what the model guesses from it")

# %% [markdown]
# Noise is *easiest* to guess when there is nothing else, so the loss falls with $t$. Guessing the *picture* gets harder
# with $t$. At $t = 500$ the eye sees nothing but noise, and the model still finds the strawberry:
# it also knows the sentence. At $t = 950$ only a red spot is left.
#
# ## The sentence becomes vectors
#
# The sentence is cut into **tokens**, words or parts of words. A **text encoder** (T5) gives each token one vector.
# T5 has attention too, so each vector has already read the whole sentence. This happens once for each sentence.

# %%
ids, _ = pipe.tokenizer([prompt])  # (1, 300), padded
words = [pipe.tokenizer.pieces.id_to_piece(i).strip("▁") for i in ids[0, : text.shape[1]].tolist()]
print(f"{' | '.join(words)}: {text.shape[1]} tokens, a vector of {text.shape[2]} numbers each")

# %% [markdown]
# `</s>` ends every sentence.
#
# ## One block, line by line
#
# The latent is cut into 8 × 8 patches of 2 × 2, and each becomes an **image token** of $C = 128$ numbers. Then come
# eight equal **blocks**, and in the end each token is turned back into its patch. We look into block 3. A hook catches
# what goes in and what comes out.

# %%
seen = {}
hook = model.transformer_blocks[3].register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], out=output))
t = torch.tensor([500])
noisy = add_noise(latent, noise, t, pipe.schedule)  # (1, 4, 16, 16)
model(noisy, t, text, mask)
hook.remove()

# %% [markdown]
# How does a block know the timestep? Removing a lot of noise is a different task from removing a little. So the
# timestep *tunes* the block:
#
# 1. $t$ becomes cosines and sines, and a small network makes a vector of them.
# 2. One linear layer turns this vector into six: two **shifts**, two **scales**, two **gates**.
# 3. A part of the block first normalises its input (each token to mean 0 and variance 1), then scales and shifts it.
#    What comes out is multiplied by the gate: a gate near zero switches the part off.
#
# This is called **adaLN**, adaptive layer normalisation. In older models each block has a linear layer of its own for
# point 2. PixArt has only a **single** one for all blocks, hence **adaLN-single**. Each block adds only a small table,
# six vectors that are learned, to the six vectors that all blocks share:

# %%
time = model.timestep_embedder(t)  # (1, C)
shared = model.timestep_modulation(silu(time)).unflatten(1, (6, -1))  # (1, 6, C), the same for all blocks
block, C = model.transformer_blocks[3], time.shape[1]
shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (block.scale_shift_table + shared).split(1, dim=1)  # (1, 1, C)
words_in = model.caption_projection(text)  # (1, L, C_text) -> (1, L, C)

x = seen["x"]  # (1, N, C), N = 64 image tokens
h = layer_norm(x, (C,), eps=1e-6) * (1 + scale_1) + shift_1  # (1, N, C)
x = x + gate_1 * block.attn1(h)  # self-attention: patches look at patches
x = x + block.attn2(x, words_in, mask)  # cross-attention: patches look at words; no timestep here
h = layer_norm(x, (C,), eps=1e-6) * (1 + scale_2) + shift_2  # (1, N, C)
x = x + gate_2 * block.ff(h)  # two linear layers with a curve (GELU) between, for each token alone
lesson.check("by hand and by the library, largest difference", (x - seen["out"]).abs().max().item(), (0, 1e-4))

# %% [markdown]
# Every line has the form $x + \mathrm{something}$: a block does not replace the tokens, it adds to them. That is why an
# adapter may add to them as well (lesson [6](06_finetune.md)). The paper's adapter sits beside `attn1`.
#
# How much does "single" save? In the large PixArt-Σ, $C = 1152$, and one such linear layer has $6 C (C + 1)$
# parameters. And is the timestep really needed? We can lie about it: the noise is that of $t = 250$, but we say
# something else.
#
# **Predict:** which lie is worse, too little noise or too much?

# %%
lesson.check("27 linear layers saved, in million parameters", 27 * 6 * 1152 * 1153 / 1e6, (215, 216), form=".0f")
n = 8 if lesson.quick else 32
many = torch.cat([pipe.noise([seed]) for seed in range(n)])  # (n, 4, 16, 16)
texts, masks, latents = text.expand(n, -1, -1), mask.expand(n, -1), latent.expand(n, -1, -1, -1)
x = add_noise(latents, many, torch.full((n,), 250), pipe.schedule)  # (n, 4, 16, 16)
lies = {said: mse_loss(model(x, torch.full((n,), said), texts, masks)[:, :4], many).item() for said in (50, 250, 750)}
lesson.table(("we say t =", "error of the noise, true t = 250"), list(lies.items()))
lesson.check("too little said: error, times that of the truth", lies[50] / lies[250], (15, 45), form=".0f")
lesson.check("too much said: error, times that of the truth", lies[750] / lies[250], (20, 60), form=".0f")

# %% [markdown]
# ## Cross-attention: which patch looks at which word
#
# The sentence enters through `attn2` alone. It is the attention of lesson 2, but the keys and values come from the
# words: $A$ has a row for each image token and a column for each word. Each row sums to 1. We take the mean over heads,
# over blocks 1 to 7, and over a few noises, and draw for each word how much each patch looks at it.

# %%
maps = []


def read(attention, inputs, _):
    q, k, _ = attention.project(*inputs[:2])  # (n, H, N, C/H), (n, H, L, C/H)
    maps.append(attention.attention_map(q, k, inputs[2]).mean(dim=(0, 1)))  # (n, H, N, L) -> (N, L)


hooks = [block.attn2.register_forward_hook(read) for block in model.transformer_blocks]
model(add_noise(latents, many, t.expand(n), pipe.schedule), t.expand(n), texts, masks)
for hook in hooks:
    hook.remove()
attention = torch.stack(maps[1:]).mean(dim=0)  # (N, L)

# %%
blank = to_tensor([scenes.draw_background("blue", "plain", 64)])  # (1, 3, 64, 64)
there = adaptive_avg_pool2d((picture - blank).abs().amax(dim=1), 8).flatten() > 0.2  # (N,): patches with strawberry
looks = attention[:, words.index("strawberry")]  # (N,)
ratio = (looks[there].mean() / looks[~there].mean()).item()
lesson.check("'strawberry' is looked at by its own patches, times the others", ratio, (5, 13), form=".1f")
figure = draw.word_maps(picture[0], attention.T.unflatten(1, (8, 8)), words)
lesson.show(figure, "05_cross_attention", "For each word, which patches look at it more than the mean patch")

# %% [markdown]
# *Red: looks at this word more than the mean patch. Blue: less.* Do not read too much into it. Each vector has read the
# whole sentence, so even the vector of "a" may carry the place or the colour. The map says which *vector* is used.
#
# ## Guidance: exaggerate what the sentence changes
#
# During training one caption in ten was replaced by the empty sentence. So the same network can be asked twice: for the
# noise $ε_\mathrm{text}$ with the sentence, and for $ε_\mathrm{empty}$ without. **Classifier-free guidance** (Ho &
# Salimans, 2022) goes on in the direction from the second to the first, by a factor $w$:
#
# $$ε = ε_\mathrm{empty} + w \, (ε_\mathrm{text} - ε_\mathrm{empty})$$
#
# Why is this the *right* difference? The best guess of the noise points away from likely pictures: one can show that
# $ε = -σ ∇ \log p(x)$, where $∇ \log p(x)$ is the direction in which pictures get more likely. So the difference is
#
# $$-σ \left( ∇ \log p(x | \mathrm{text}) - ∇ \log p(x) \right) = -σ ∇ \log p(\mathrm{text} | x)$$
#
# The last step is Bayes' rule: $p(x | \mathrm{text}) = p(\mathrm{text} | x) \, p(x) / p(\mathrm{text})$, and
# $p(\mathrm{text})$ has no $x$ in it. So what is common to all pictures cancels. The rest is the direction in which the
# picture fits the sentence better, and nothing else. $w = 1$ uses it as it is; $w = 2$ counts the sentence twice.
#
# First: does the sentence help at all? The error at $t = 500$, with the right caption, none, and a wrong one:

# %%
errors = {}
for said in (prompt, "", "a taco in the middle on a red background"):
    told = pipe.encode_prompt([said] * n)  # (n, L, C_text), (n, L)
    errors[said] = noise_error(model, latents, t.expand(n), many, *told, pipe.schedule).mean().item()
lesson.table(("the model is told", "error of the noise"), [(said or "nothing", each) for said, each in errors.items()])
right, nothing, wrong = errors.values()
lesson.check("nothing told: error, times that with the right caption", nothing / right, (4, 14), form=".1f")
lesson.check("wrong caption: error, times that with the right one", wrong / right, (20, 80), form=".0f")

# %% [markdown]
# Now draw with different $w$. A small classifier that ships with the model, the **judge**, says whether thing,
# background, pattern and place are as the caption says.
#
# **Predict:** does more guidance always help?

# %%
judge, strengths = load_judge(weights / "judge"), (0, 1, 2, 4, 10)
tasks = captions_to_judge(4 if lesson.quick else 20, withheld=False)  # scenes, captions
sampler = {"steps": 6 if lesson.quick else 10}
table, drawn, joint = [], [], []
for w in strengths:
    shares, _ = score(pipe, judge, *tasks, guidance=w, **sampler)
    joint.append(shares["joint"])
    table.append((f"w = {w}", *(f"{shares[name]:.0%}" for name in ("thing", "background", "place", "joint"))))
    drawn += pipe.generate([prompt], guidance=w, **sampler)
lesson.table(("right, by the judge", "thing", "background", "place", "all"), table)
lesson.check("all right: best w, above w = 0 by", max(joint) - joint[0], (0.9, 1), form=".0%")
lesson.check("all right: best w, above w = 10 by", max(joint) - joint[-1], (0.2, 0.9), quick=(0, 1), form=".0%")
figure = draw.picture_rows({"": drawn}, [row[0] for row in table])
lesson.show(figure, "05_guidance", "The same noise and sentence with five strengths of guidance")

# %% [markdown]
# $w = 0$ ignores the sentence, and nothing is right. $w = 1$ is enough for the judge, but look at the strawberry: its
# seeds are missing, and with $w = 2$ they are there. $w = 10$ leaves the pictures that the model has learned: colours
# become harsh, shapes break, and half of the pictures are wrong. The tiny model uses $w = 2$.
#
# ## The sampler's loop
#
# Now all parts are there. Start from pure noise at $t = 999$. In each step:
#
# 1. ask for the noise, with guidance;
# 2. solve for the clean picture, $x_0 = (x_t - σ_t ε) / α_t$. It is a guess, and at first a bad one;
# 3. so do not jump there: put the *same* noise back, a little less of it: $x_{t'} = α_{t'} x_0 + σ_{t'} ε$.
#
# This is **DDIM**, the simplest sampler:

# %%
(empty,), _ = pipe.encode_prompt([""])
both, both_mask = pad_rows([empty, text[0]])  # (2, L, C_text), (2, L)
w = pipe.defaults["guidance"]
times = sampling_timesteps(20 if lesson.quick else 50, pipe.schedule).tolist()  # 999, 979, …, 20
x, by_hand = noise, []  # (1, 4, 16, 16)
for t, t_next in zip(times, [*times[1:], None]):
    output = model(torch.cat([x, x]), torch.full((2,), t), both, both_mask)[:, :4]  # (2, 4, 16, 16)
    without, with_text = output.chunk(2)  # (1, 4, 16, 16) each
    epsilon = without + w * (with_text - without)
    x0 = (x - sigma[t] * epsilon) / alpha[t]  # (1, 4, 16, 16)
    x = x0 if t_next is None else alpha[t_next] * x0 + sigma[t_next] * epsilon
    by_hand.append(x)

# %% [markdown]
# The library's sampler, **DPM-Solver++** (Lu et al., 2022), also looks at the guess of the step before, and continues
# its trend. So it needs fewer steps. Its first step has nothing to look back at: there it must equal ours.

# %%
first = next(pipe.sample(noise, text, mask, steps=len(times), guidance=w))[1]  # (1, 4, 16, 16)
apart = (by_hand[0] - first).abs().max().item()
lesson.check("first step by hand and by the library, largest difference", apart, (0, 1e-4))
steps = list(pipe.sample(noise, text, mask, steps=20, guidance=w))  # (t, x, guess of x_0) for each
final = pipe.decode(steps[-1][1])  # (1, 3, 64, 64)
same = torch.equal(to_tensor(pipe.generate([prompt], steps=20, latents=noise)), to_tensor(to_pil(final)))
lesson.check("pipe.generate is these same steps in one call (1: yes)", same, (1, 1))
likeness = psnr(pipe.decode(by_hand[-1]), final)
lesson.check("steps by hand and the library's 20, PSNR in dB", likeness, (40, 60), quick=(25, 60), form=".0f")

# %%
columns = [0, 4, 8, 12, 19]
before = [noise, *(x for _, x, _ in steps)]  # what goes into each step
rows = {
    "picture": to_pil(pipe.decode(torch.cat([before[i] for i in columns]))),
    "guess": to_pil(pipe.decode(torch.cat([steps[i][2] for i in columns]))),
}
figure = draw.picture_rows(rows, [f"step {i + 1}, t = {steps[i][0]}" for i in columns])
lesson.show(figure, "05_denoising", "Five steps from noise to a strawberry, and what the model expects at each")

# %% [markdown]
# The guess begins with the background and a dark spot at the right place. Outlines come next, and the seeds come last.
# This order is a property of the noise: a little noise hides details, only a lot of it hides large areas.
#
# ## Where it stops being true
#
# - **A latent is not the picture.** What the decoder cannot draw, no training of the transformer brings back.
# - **$ε = -σ ∇ \log p$ holds for the best possible guess.** The real model is only near it, and large $w$ enlarges
#   its errors too. This is why $w = 10$ breaks pictures.
# - **A map over words is no explanation.** See above: vectors have read the whole sentence.
# - **Unknown words.** T5 gives a vector for any word. The tiny model knows 100 things; asked for a robot, it draws some
#   mixture. Lesson 6 teaches it one.
#
# ## Exercises
#
# 1. Why does the sampler not jump to $x_0$ in its first step?
# 2. What is $ε$ with $w = 1$? And with $w = 0$? How much does the second question cost?
# 3. In the block by hand, set `gate_1` to zero. Which part of the block is off? Could the model still place things?
#
# <details>
# <summary>Answers</summary>
#
# 1. The first guess is the mean of all pictures that fit the sentence, so it is blurred. Each later step sees less
#    noise, chooses among fewer pictures, and the guess sharpens.
# 2. $ε_\mathrm{text}$, the plain model; and $ε_\mathrm{empty}$, a model that ignores the sentence. Guidance asks two
#    questions in each step, so it doubles the time.
# 3. Self-attention. Patches could not tell each other anything in this block. Each still knows its own position, which
#    is added to the tokens at the start, and reads the words; so yes, but a thing's parts would not fit together.
#
# </details>
#
# Next: [teach this model something new](06_finetune.md).

# %%
lesson.end()
