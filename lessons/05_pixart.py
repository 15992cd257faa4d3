# %% [markdown]
# # 5. From noise and a sentence to a picture
#
# **The question.** How does one network turn pure noise and a sentence into a picture? We ask it twenty times: "which
# part of this is noise?" Each time we take away a little of what it names:
#
# ![Five steps from noise to a strawberry, and what the model expects at each](figures/05_denoising.png)
#
# *Top: the picture on its way, at five of twenty steps. Bottom: the clean picture that the model expects at that step.
# No strawberry on blue was in the training pictures.*
#
# The network is **PixArt-Σ** (Chen et al., 2024), the model that the paper fine-tunes. Here it is small: 2.3 million
# parameters instead of 610 million, but every part is there. These are the parts:
#
#     encoder        picture                            →  latent, a smaller picture
#     text encoder   sentence                           →  vectors, one for each word
#     network        latent with noise, t, vectors      →  the noise in the latent
#     sampler        noise, 20 questions to the network →  latent
#     decoder        latent                             →  picture
#
# You need lesson [2](02_attention_as_dictionary.md) for attention. This lesson takes about 10 seconds on two CPU cores,
# 5 with `--quick`.

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
# A picture of 64 × 64 pixels has 12,288 numbers. Most of them can be guessed from their neighbours. So the network does
# not work on pixels. An **autoencoder** has two halves that are trained together. The **encoder** turns a picture into
# few numbers, the **decoder** turns them back into a picture. These few numbers are the **latent** of the picture. Here
# it has 4 channels of 16 × 16. (The autoencoder is a VAE, as in lesson [4](04_mnist_vae.md).)
#
# How much is lost on the way? We measure the likeness of two pictures by their **PSNR**, the peak signal-to-noise
# ratio, in decibels (dB). At 20 dB a typical error is 10 % of the range from black to white, at 40 dB it is 1 %.
#
# **Predict:** the latent has far fewer numbers than the picture. What will the decoded picture have lost?

# %%
scene = scenes.Scene((scenes.Thing("strawberry", "large", "top left"),), "blue")
prompt = "a strawberry at the top left on a blue background"
picture = to_tensor([scenes.draw(scene)])  # (1, 3, 64, 64), from -1 to 1
latent = pipe.encode_images(picture)  # (1, 4, 16, 16)
decoded = pipe.decode(latent)  # (1, 3, 64, 64)


def psnr(image, other):
    """In dB, for pictures from -1 to 1"""
    return -10 * torch.log10(((image - other) / 2).square().mean()).item()


# %%
lesson.check("numbers in the picture for each one in the latent", picture.numel() / latent.numel(), (12, 12))
lesson.check("picture and decoded latent, PSNR in dB", psnr(picture, decoded), (30, 36), form=".1f")
figure = draw.latent(picture[0], latent[0], decoded[0])
lesson.show(figure, "05_latent", "A picture, its latent, and the decoded picture")

# %% [markdown]
# *The four channels are not colours, but each is still a small picture: the strawberry stays in its place. Compare the
# seeds in the first and the last picture to see what is lost.*
#
# ## What is trained: guess the noise
#
# Take a latent $x_0$ and add noise. The **timestep** $t$, from 0 to 999, says how much:
#
# $$x_t = α_t x_0 + σ_t ε, \qquad α_t^2 + σ_t^2 = 1$$
#
# $ε$ (epsilon) is noise: each of its numbers is drawn from the standard normal distribution. $α_t$ says how much of the
# picture is left, and $σ_t$ how much noise there is. At $t = 0$ there is nearly no noise, at $t = 999$ nearly nothing
# else. The table of all $α_t$ and $σ_t$ is the **schedule**. It is fixed, not learned.
#
# The network gets $x_t$, $t$ and the sentence, and must guess $ε$. The loss is one line, the mean squared error:
#
# $$\lVert \mathrm{model}(x_t, t, \mathrm{text}) - ε \rVert^2$$
#
# That is all of the training: draw a picture, a timestep and noise at random, and take a step that lowers this loss.
# (The network gives 8 channels. The first 4 are the guess of $ε$. Nothing here uses the others.)
#
# A guess of the noise is also a guess of the picture: the first equation says $x_0 = (x_t - σ_t ε) / α_t$.
#
# **Predict:** we add noise of five strengths to the strawberry. From which can the model still guess the picture?

# %%
alpha, sigma = alphas_sigmas(pipe.schedule)  # (1000,) each
text, mask = pipe.encode_prompt([prompt])  # (1, L, C_text), (1, L): see below
noise = pipe.noise([0])  # (1, 4, 16, 16)
rows, noisy, guesses = [], [], []
for t in (50, 250, 500, 750, 950):
    x = alpha[t] * latent + sigma[t] * noise  # (1, 4, 16, 16)
    epsilon = model(x, torch.tensor([t]), text, mask)[:, :4]  # (1, 4, 16, 16)
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
# The last two columns both fall, but a lower loss is better and fewer dB are worse. The *noise* is easiest to guess
# when there is nothing else. The *picture* is harder to guess the larger $t$ is. How can both be true? An error of the
# noise becomes an error of the picture, times $σ_t / α_t$. At $t = 50$ this factor is 0.2, at $t = 950$ it is 97.
#
# Look at $t = 500$: the eye sees only noise, but the guess of the model is already close. The model has help, because
# it also knows the sentence.
#
# ## The sentence becomes vectors
#
# The sentence is cut into **tokens**: words, or parts of words. A **text encoder** (T5) turns each token into one
# vector. T5 has attention too, so each vector knows of the whole sentence. T5 runs once for each sentence, not in every
# step.

# %%
ids, _ = pipe.tokenizer([prompt])  # (1, 300), padded
words = [pipe.tokenizer.pieces.id_to_piece(i).strip("▁") for i in ids[0, : text.shape[1]].tolist()]
print(f"{' | '.join(words)}: {text.shape[1]} tokens, a vector of {text.shape[2]} numbers each")

# %% [markdown]
# The last token, `</s>`, ends every sentence.
#
# ## One block, line by line
#
# The latent is cut into 8 × 8 patches of 2 × 2. A linear layer turns each patch into an **image token** of $C = 128$
# numbers, and the position of the patch is added to it, as sines and cosines. Then come eight **blocks**. They have the
# same form, but each has weights of its own. A last linear layer turns each token back into its patch.
#
# We look into block 3. A hook catches what goes in and what comes out.

# %%
seen = {}
hook = model.transformer_blocks[3].register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], out=output))
t = torch.tensor([500])
noisy = add_noise(latent, noise, t, pipe.schedule)  # (1, 4, 16, 16)
model(noisy, t, text, mask)
hook.remove()

# %% [markdown]
# A block has three parts: self-attention, cross-attention, and two linear layers (`ff`). **Self-attention** lets the
# patches look at each other, so that they draw one thing together. **Cross-attention** lets each patch look at the
# words, so that it knows what to draw. Its queries come from the patches, its keys and values from the words.
#
# How does a block know the timestep? Removing a lot of noise is a different task from removing a little. So the
# timestep *tunes* the block:
#
# 1. $t$ becomes cosines and sines, and a small network makes a vector of them.
# 2. One linear layer turns this vector into six: a **shift**, a **scale** and a **gate** for the self-attention, and
#    the same three for the two linear layers.
# 3. Before such a part, each token is normalised to mean 0 and variance 1, multiplied by 1 + scale, and shifted.
# 4. After it, the result is multiplied by the gate. A gate of zero switches the part off.
#
# This is called **adaLN**, adaptive layer normalisation. In DiT, the model before PixArt, each block has a linear layer
# of its own for point 2. PixArt has a **single** one that all blocks share: **adaLN-single**. A block can still differ
# from the others, because it adds a small table of its own to the six shared vectors: six vectors that are learned.

# %%
time = model.timestep_embedder(t)  # (1, C)
shared = model.timestep_modulation(silu(time)).unflatten(1, (6, -1))  # (1, 6, C), the same for all blocks
block, C = model.transformer_blocks[3], time.shape[1]
shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (block.scale_shift_table + shared).split(1, dim=1)  # (1, 1, C)
words_in = model.caption_projection(text)  # (1, L, C_text) -> (1, L, C), the same for all blocks

x = seen["x"]  # (1, N, C), N = 64 image tokens
h = layer_norm(x, (C,), eps=1e-6) * (1 + scale_1) + shift_1  # (1, N, C)
x = x + gate_1 * block.attn1(h)  # self-attention: patches look at patches
x = x + block.attn2(x, words_in, mask)  # cross-attention: patches look at words; no timestep here
h = layer_norm(x, (C,), eps=1e-6) * (1 + scale_2) + shift_2  # (1, N, C)
x = x + gate_2 * block.ff(h)  # two linear layers with a curve (GELU) between, for each token alone
lesson.check("by hand and by the library, largest difference", (x - seen["out"]).abs().max().item(), (0, 1e-4))

# %% [markdown]
# Three lines have the form $x + \mathrm{something}$: a block does not replace the tokens, it adds to them. That is why
# an adapter may add to them as well (lesson [6](06_finetune.md)). The paper's adapter sits beside `attn1`.
#
# How much does "single" save? The large PixArt-Σ has 28 blocks and $C = 1152$. One such linear layer has $6 C (C + 1)$
# parameters, and 27 of the 28 are saved. That is about a third of what the whole model has, 610 million:

# %%
lesson.check("27 linear layers saved, in million parameters", 27 * 6 * 1152 * 1153 / 1e6, (215, 216), form=".0f")

# %% [markdown]
# Is the timestep really needed? We can lie about it: we add the noise of $t = 250$, but tell the model another $t$.
#
# **Predict:** which lie is worse, too small a $t$ or too large a $t$?

# %%
n = 8 if lesson.quick else 32
many = torch.cat([pipe.noise([seed]) for seed in range(n)])  # (n, 4, 16, 16)
texts, masks, latents = text.expand(n, -1, -1), mask.expand(n, -1), latent.expand(n, -1, -1, -1)
x = add_noise(latents, many, torch.full((n,), 250), pipe.schedule)  # (n, 4, 16, 16)
lies = {said: mse_loss(model(x, torch.full((n,), said), texts, masks)[:, :4], many).item() for said in (50, 250, 750)}
lesson.table(("told t =", "error of the noise, true t = 250"), list(lies.items()))
lesson.check("told too small a t: error, times that of the truth", lies[50] / lies[250], (80, 300), form=".0f")
lesson.check("told too large a t: error, times that of the truth", lies[750] / lies[250], (40, 150), form=".0f")

# %% [markdown]
# Both lies harm a lot: without the right $t$ the model cannot tell noise from picture.
#
# ## Cross-attention: which patch looks at which word
#
# The sentence enters through `attn2` alone. There $A$ has a row for each image token and a column for each word. Each
# row sums to 1, so it says how a patch shares out its attention. We take the mean over heads, over noises, and over all
# blocks but the first, where no patch has read a word yet. Then we draw for each word how much each patch looks at it.
#
# **Predict:** which patches look at "strawberry"? And which at "blue"?

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
lesson.check("'strawberry' is looked at by its own patches, times the others", ratio, (13, 50), form=".1f")
figure = draw.word_maps(picture[0], attention.T.unflatten(1, (8, 8)), words)
lesson.show(figure, "05_cross_attention", "For each word, which patches look at it more than the mean patch")

# %% [markdown]
# *Red: this patch looks at the word more than the mean patch does. Blue: less.*
#
# Do not read too much into these maps. Each vector knows of the whole sentence, so even the vector of "a" may carry the
# place or the colour. A map says which *vector* is used, not what it says.
#
# ## Guidance: exaggerate what the sentence changes
#
# During training one caption in ten was replaced by the empty sentence. So we can ask the same network twice: for the
# noise $ε_\mathrm{text}$ with the sentence, and for the noise $ε_\mathrm{empty}$ with the empty one.
# **Classifier-free guidance** (Ho & Salimans, 2022) takes their difference times a **strength** $w$:
#
# $$ε = ε_\mathrm{empty} + w (ε_\mathrm{text} - ε_\mathrm{empty})$$
#
# Why is this the *right* difference? Write $x$ for the noisy latent, $α$ and $σ$ for those of its timestep, and
# $∇ \log p(x)$ for the direction in which $x$ gets more likely.
#
# 1. If the clean picture $x_0$ is known, $x$ has a normal distribution with mean $α x_0$ and variance $σ^2$. So
#    $∇ \log p(x | x_0) = -(x - α x_0) / σ^2 = -ε / σ$.
# 2. Many pictures may lie behind $x$. Take the mean of both sides over all of them, weighted by $p(x_0 | x)$. The left
#    side becomes $∇ \log p(x)$: to see this, divide $∇ p(x) = \int p(x_0) ∇ p(x | x_0) dx_0$ by $p(x)$. On the right,
#    the mean of $ε$ is the guess with the lowest loss. So $ε_\mathrm{empty} = -σ ∇ \log p(x)$.
# 3. With the sentence, in the same way, $ε_\mathrm{text} = -σ ∇ \log p(x | \mathrm{text})$. The difference is
#
# $$ε_\mathrm{text} - ε_\mathrm{empty} = -σ ∇ \log \frac{p(x | \mathrm{text})}{p(x)} = -σ ∇ \log p(\mathrm{text} | x)$$
#
# The last step is Bayes' rule: $p(x | \mathrm{text}) / p(x) = p(\mathrm{text} | x) / p(\mathrm{text})$, and
# $p(\mathrm{text})$ does not depend on $x$.
#
# So what is common to all pictures cancels. What is left is the direction in which $x$ fits the sentence better, and
# nothing else. The minus is right, because the sampler takes the noise away. With $w = 1$ the difference is added once:
# that is the plain model. With $w = 2$ the sentence counts twice.
#
# First: does the sentence help at all? We print the error at $t = 500$ with the right caption, with none, and with a
# wrong one:

# %%
errors = {}
for said in (prompt, "", "a taco in the middle on a red background"):
    told = pipe.encode_prompt([said] * n)  # (n, L, C_text), (n, L)
    errors[said] = noise_error(model, latents, t.expand(n), many, *told, pipe.schedule).mean().item()
lesson.table(("the model is told", "error of the noise"), [(said or "nothing", each) for said, each in errors.items()])
right, nothing, wrong = errors.values()
lesson.check("nothing told: error, times that with the right caption", nothing / right, (9, 36), form=".1f")
lesson.check("wrong caption: error, times that with the right one", wrong / right, (50, 230), form=".0f")

# %% [markdown]
# Now we draw with different $w$. A small classifier ships with the model. This **judge** says whether thing,
# background, pattern and place of a picture are as its caption says.
#
# **Predict:** does more guidance always help?

# %%
judge = load_judge(weights / "judge")
strengths = 0, 1, 2, 4, 10
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
# $w = 0$ ignores the sentence, so almost nothing is right. $w = 10$ leads away from what the model has learned:
# colours become harsh, shapes break, and the judge finds fewer pictures right. Already at $w = 4$ it may miss some.
# Compare the details of the strawberry. The tiny model's own $w$ is in `pipe.defaults`.
#
# ## The sampler's loop
#
# Now all parts are there. Start from pure noise at $t = 999$. In each step:
#
# 1. Ask for the noise $ε$, with guidance.
# 2. Solve for the clean picture: $x_0 = (x_t - σ_t ε) / α_t$. It is a guess, and at first a bad one.
# 3. So do not jump there. Go to the next, smaller timestep $t'$: add the *same* $ε$ again, but less of it,
#    $x_{t'} = α_{t'} x_0 + σ_{t'} ε$.
#
# This is **DDIM** (Song et al., 2021), the simplest sampler:

# %%
(empty,), _ = pipe.encode_prompt([""])
both, both_mask = pad_rows([empty, text[0]])  # (2, L, C_text), (2, L): both questions in one batch
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
# The library's sampler, **DPM-Solver++** (Lu et al., 2022), also looks back at the guess of $x_0$ in the step before,
# and continues the trend. So it needs fewer steps. Its first step has nothing to look back at, so there it must equal
# ours.
#
# **Predict:** do our many simple steps and the library's 20 end at the same picture?

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
# Read the row of guesses from left to right: large areas come first, then outlines, and details such as the seeds come
# last. This order is a property of the noise: a little noise hides details, only a lot of it hides large areas.
#
# ## Where it stops being true
#
# - **A latent is not the picture.** What the decoder cannot draw, no training of the network brings back.
# - **Guidance is exact only for the best possible guess.** The real model is only near it, and a large $w$ enlarges the
#   errors too. Besides, the model was never trained on what comes out with $w > 1$.
# - **A map over words is no explanation.** Each vector knows of the whole sentence.
# - **Unknown words.** T5 gives a vector for any word. The tiny model knows 200 things, and a robot is not among them.
#   Asked for one, it draws some mixture. Lesson [6](06_finetune.md) teaches it a robot.
#
# ## Exercises
#
# 1. Why does the sampler not jump to $x_0$ in its first step?
# 2. What is $ε$ with $w = 1$? And with $w = 0$? How much time does guidance cost?
# 3. In the block by hand, set `gate_1` to zero. Which part of the block is off? Do the patches still know where they
#    are?
#
# <details>
# <summary>Answers</summary>
#
# 1. The first guess is the mean of all pictures that fit the sentence, so it is blurred. In each later step there is
#    less noise, so fewer pictures are possible, and the guess gets sharper.
# 2. With $w = 1$ it is $ε_\mathrm{text}$, the plain model. With $w = 0$ it is $ε_\mathrm{empty}$, a model that ignores
#    the sentence. Guidance asks the network twice in each step, so it doubles the time.
# 3. The self-attention is off, so in this block the patches cannot look at each other. They still know where they are,
#    because the position was added to the tokens before the first block. They also still read the words.
#
# </details>
#
# Next: [teach this model something new](06_finetune.md).

# %%
lesson.end()
