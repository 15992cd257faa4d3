"""Train a tiny PixArt-Σ from nothing, on scenes: `python -m dit.tiny.pretrain --out weights/tiny`.

    tokenizer -> vae -> text encoder -> judge -> clip -> transformer

With `--resume` a stage whose part is in `--out` is skipped, and one that was interrupted goes on from its checkpoint.
The order is that of the real model: the text encoder is trained first, on its own, and stays frozen.
"""

import dataclasses
import json
import os
import string
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dit import parallel
from dit.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae, save_index, save_part
from dit.cli import Parser, positive, run, seed, whole
from dit.config import SchedulerConfig, T5Config, TransformerConfig, VAEConfig
from dit.diffusion import alphas_sigmas, noise_error
from dit.metrics import need_transformers
from dit.pictures import to_bytes, to_tensor
from dit.t5 import T5Encoder
from dit.tiny.judge import Judge, labels, save_judge
from dit.tiny.scenes import BACKGROUNDS, COLOURS, PLACES, WORLDS, caption, draw, natural_image, sample_scene
from dit.tiny.subjects import draw_parts, sample_creature, subject_caption
from dit.transformer import PixArtTransformer, position_table
from dit.vae import AutoencoderKL
from sparsecode.common import UserError, replacing

HEADS = 4  # of the transformer
# What travels with the model as its defaults.json: the guidance that dit.tiny.judge found best of 1.5, 3 and 4.5,
# and the fine-tuning settings that draw a new subject within two minutes on two CPU cores.
DEFAULTS = {"guidance": 3.0, "finetune": {"epochs": 50, "batch_size": 4, "lr": 0.003, "lr_schedule": "inverse"}}

# ---- one training loop for all stages ---------------------------------------------------------------------------


def fit(name, module, loss, *, steps, lr, folder, ema=0.999, decay=0.3, every=500, device="cpu"):
    """Minimise `loss(step) -> scalar` with AdamW and return the averaged (EMA) weights, loaded into `module`.

    The batch of a step depends on the step alone, so that a checkpoint needs no random state. The learning rate
    warms up over 100 steps, stays, and falls to zero over the last `decay` of the steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.pt"
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    start = 0
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, disable=None, mininterval=1)
    log = open(folder / f"{name}.csv", "a", buffering=1)
    for step in bar:
        factor = min(1.0, (step + 1) / 100, (steps - step) / (decay * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        parallel.average_gradients(module.parameters())
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        rate = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, tensor in module.state_dict().items():
                average[key].lerp_(tensor, 1 - rate)
        if step % 50 == 0 and parallel.rank() == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
            log.write(f"{step},{value.item():.6f}\n")
        if parallel.rank() == 0 and ((step + 1) % every == 0 or step + 1 == steps):
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            with replacing(file) as temporary:
                torch.save({**state, "step": step + 1}, temporary)
    module.load_state_dict(average)
    return module.eval()


def rng_of(stage, seed, step):
    """A generator for one step of one stage."""
    return np.random.default_rng([sum(map(ord, stage)), seed, step, parallel.rank()])


# ---- autoencoder ------------------------------------------------------------------------------------------------


def train_vae(args, folder):
    """Half scenes of the full world, half procedural photographs, so that real photos survive it as well."""
    rng = rng_of("vae", args.seed, 0)
    half = args.vae_pictures // 2
    pool = [draw(sample_scene(WORLDS["full"], rng), rng) for _ in tqdm(range(half), desc="scenes", disable=None)]
    pool += [natural_image(rng) for _ in tqdm(range(half), desc="photographs", disable=None)]
    pool = to_bytes(pool)  # (n, 3, 64, 64)

    torch.manual_seed(args.seed)
    config = VAEConfig(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=64,
                       scaling_factor=1.0, mid_block_add_attention=False)  # fmt: skip
    vae = AutoencoderKL(config).to(args.device, memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[config.latent_channels :] = -5.0  # start with little noise in the latents

    def loss(step):
        rng = rng_of("vae", args.seed, step + 1)
        side = 32 if step < 0.6 * args.vae_steps else 64  # small crops are cheaper and teach the same filters
        pick = torch.from_numpy(rng.integers(0, len(pool), 16 if side == 32 else 8))
        y, x = rng.integers(0, 64 - side + 1, 2)
        images = pool[pick, :, y : y + side, x : x + side].to(args.device).float() / 127.5 - 1
        images = images.flip(3) if rng.random() < 0.5 else images
        images = images.contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.posterior(images)
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32)).to(args.device)
        output = vae.decode(mean + (0.5 * logvar).exp() * noise)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(output, images) + 0.1 * F.l1_loss(output, images) + 1e-4 * kl

    vae = fit("vae", vae, loss, steps=args.vae_steps, lr=2e-3, folder=folder, device=args.device)
    with torch.no_grad():  # latents of unit variance for the transformer
        scale = 1 / vae.encode(pool[: half : max(1, half // 500)].to(args.device) / 127.5 - 1).std().item()
    vae.config = dataclasses.replace(config, scaling_factor=round(scale, 5))
    return vae


# ---- tokenizer and text encoder ---------------------------------------------------------------------------------

# Words beyond those of scenes, so that prompts can speak of other things.
WORDS = """
a an the and with of in on at to is it its this that from by for near under over beside behind between into
picture photo image drawing painting sketch sculpture shiny dark light bright soft small large tiny huge old new
grey brown pink cyan gold silver wooden metal glass plastic paper stone wet dry striped checked spotted
robot owl cat dog fish car boat train plane rocket snail duck bear rabbit fox bird frog mouse horse sheep cow bee
butterfly spider turtle penguin monster alien ghost wizard clown king queen child man woman face head eye hat
toy backpack boot bowl can candle teapot vase clock glasses sneaker plushie cartoon sloth wolf
sun moon sky cloud rain snow mountain river lake sea beach sand forest jungle desert field garden street city road
bridge tower castle barn church shop room kitchen table chair bed floor wall window door box ball cup plate book
tree flower leaf grass mushroom apple banana cherry lemon orange strawberry bread cake pizza egg
red green blue yellow purple white black cube shaped floating top bottom left right middle centre
""".split()


def train_tokenizer(args, folder):
    """A unigram sentencepiece model with T5's special tokens: pad 0, end of sentence 1, unknown 2."""
    import sentencepiece

    rng = rng_of("tokenizer", args.seed, 0)
    sentences = [caption(sample_scene(WORLDS[world], rng), rng) for world in WORLDS for _ in range(4000)]
    sentences += [" ".join(rng.choice(WORDS, 6)) for _ in range(4000)] + list(string.printable.strip())
    with replacing(folder / "spiece.model") as temporary, open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, model_type="unigram", vocab_size=1000,
            hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            num_threads=1, minloglevel=2,
        )  # fmt: skip


KINDS = WORLDS["full"].kinds
LABELS = {"kind": KINDS, "colour": tuple(COLOURS), "size": ("large", "small"), "place": tuple(PLACES)}


class TextReader(nn.Module):
    """The encoder with the heads that it is trained by and that are thrown away: every token must know what the whole
    caption says (two objects' attributes, background, pattern, which words occur) and which token it is itself."""

    def __init__(self, config):
        super().__init__()
        self.encoder = T5Encoder(config)
        things = 2 * sum(len(values) + 1 for values in LABELS.values())  # one more class: not said
        self.attributes = nn.Linear(config.d_model, things + len(BACKGROUNDS) + 1 + 4)
        self.words = nn.Linear(config.d_model, config.vocab_size)
        self.identity = nn.Linear(config.d_model, config.vocab_size)

    def splits(self):
        return [len(values) + 1 for values in LABELS.values()] * 2 + [len(BACKGROUNDS) + 1, 4]


def labelled_caption(world, rng):
    """A caption and its attribute labels, 0 = not said. In one of five an unknown thing replaces an object."""
    scene = sample_scene(world, rng)
    text = caption(scene, rng)
    labels = []
    for slot in range(2):
        thing = scene.things[slot] if slot < len(scene.things) else None
        said = {name: thing is not None for name in LABELS}
        if thing and rng.random() < 0.2:
            noun = f"{thing.colour} {thing.kind}"
            word, with_colour = rng.choice(WORDS), rng.random() < 0.5
            text = text.replace(noun, f"{thing.colour} {word}" if with_colour else str(word), 1)
            said |= {"kind": False, "colour": with_colour}
        said["place"] &= " the " in text
        labels += [LABELS[n].index(getattr(thing, n)) + 1 if said[n] else 0 for n in LABELS]
    labels += [list(BACKGROUNDS).index(scene.background) + 1, ("plain", "striped", "checked").index(scene.pattern) + 1]
    return text, labels


def train_text(args, tokenizer, folder):
    torch.manual_seed(args.seed)
    config = T5Config(vocab_size=tokenizer.pieces.get_piece_size(), d_model=128, d_kv=32, d_ff=256, num_layers=3,
                      num_heads=4)  # fmt: skip
    reader = TextReader(config).to(args.device)
    for name, p in reader.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 if "embed" in name else p.shape[1] ** -0.5)
        if name.endswith(".q.weight"):  # T5 has no 1/√d in its attention, so its queries start smaller
            p.data /= config.d_kv**0.5
    world = WORLDS[args.world]

    def loss(step):
        rng = rng_of("text", args.seed, step + 1)
        texts, labels = zip(*(labelled_caption(world, rng) for _ in range(48)))
        texts += tuple(" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(16))
        ids, mask = (t[:, :32].to(args.device) for t in tokenizer(texts, 32))
        hidden = reader.encoder(ids, mask)  # (B, L, C)
        labels = torch.tensor(labels, device=args.device)  # (48, attributes)
        real = mask[:48].bool()
        total = 0.0
        for i, logits in enumerate(reader.attributes(hidden[:48]).split(reader.splits(), dim=2)):
            target = labels[:, i, None].expand_as(real)  # (48, L): the same for every token
            total = total + F.cross_entropy(logits[real], target[real])
        present = F.one_hot(ids, config.vocab_size).amax(1).float()  # (B, vocabulary)
        known = (mask[..., None] * hidden).sum(1) / mask.sum(1, keepdim=True)  # (B, C): mean over real tokens
        words = F.binary_cross_entropy_with_logits(reader.words(known), present) * config.vocab_size / 20
        identity = F.cross_entropy(reader.identity(hidden)[mask.bool()], ids[mask.bool()])
        return total + words + identity

    return fit("text", reader, loss, steps=args.text_steps, lr=2e-3, folder=folder, device=args.device).encoder


# ---- transformer ------------------------------------------------------------------------------------------------


@torch.no_grad()
def cached_scenes(args, vae, tokenizer, encoder, folder):
    """Latents of `--pictures` scenes and embeddings of all their captions: the frozen parts run once."""
    file = folder / "scenes.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    rng, world = rng_of("scenes", args.seed, 0), WORLDS[args.world]
    latents, texts = [], []
    for start in tqdm(range(0, args.pictures, 100), desc="scenes", disable=None):
        scenes = [sample_scene(world, rng) for _ in range(100)]
        images = to_tensor([draw(scene, rng) for scene in scenes]).to(args.device)
        latents.append(vae.encode(images).half().cpu())
        texts += [caption(scene, rng) for scene in scenes for _ in range(2)]  # picture i has captions 2i, 2i + 1
    unique = [""] + sorted(set(texts))
    row = {text: i for i, text in enumerate(unique)}
    ids, mask = tokenizer(unique)
    ids, mask = ids[:, : mask.sum(1).max()], mask[:, : mask.sum(1).max()]
    text = torch.cat([encoder(i.to(args.device), m.to(args.device)).half().cpu()
                      for i, m in zip(ids.split(500), mask.split(500))])  # fmt: skip
    data = {"latents": torch.cat(latents), "caption": torch.tensor([row[t] for t in texts]), "text": text, "mask": mask}
    with replacing(file) as temporary:
        torch.save(data, temporary)
    return data


def train_transformer(args, vae, tokenizer, encoder, folder):
    data = cached_scenes(args, vae, tokenizer, encoder, folder)
    config = TransformerConfig(num_layers=args.layers, num_attention_heads=HEADS,
                               attention_head_dim=args.width // HEADS, sample_size=64 // vae.config.factor,
                               caption_channels=encoder.config.d_model, cross_attention_dim=args.width,
                               interpolation_scale=1.0)  # fmt: skip
    torch.manual_seed(args.seed)
    model = PixArtTransformer(config).to(args.device)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out.weight)  # the text joins in when it is of use
    nn.init.normal_(model.timestep_modulation.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    schedule = SchedulerConfig()
    alpha, _ = alphas_sigmas(schedule, args.device)

    def loss(step):
        rng = rng_of("transformer", args.seed, step + 1)
        pick = torch.from_numpy(rng.integers(0, len(data["latents"]), args.batch_size))
        row = data["caption"][2 * pick + torch.from_numpy(rng.integers(0, 2, args.batch_size))]
        row[torch.from_numpy(rng.random(args.batch_size) < 0.1)] = 0  # the empty caption, for guidance
        mask = data["mask"][row]
        mask = mask[:, : mask.sum(1).max()]
        text = data["text"][row, : mask.shape[1]].float()
        latents = data["latents"][pick].float()
        # Half of the timesteps from the middle, where the objects take shape.
        low, high = (300, 900) if step < 0.5 * args.steps else (100, 700)
        t = np.where(rng.random(args.batch_size) < 0.5, rng.integers(0, schedule.num_train_timesteps, args.batch_size),
                     rng.integers(low, high, args.batch_size))  # fmt: skip
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        t, noise, latents, text, mask = (x.to(args.device) for x in (torch.from_numpy(t), noise, latents, text, mask))
        weight = (1 / alpha[t] ** 2).clamp(max=40.0)  # the error of x_0 rather than of ε, bounded
        return (weight * noise_error(model, latents, t, noise, text, mask, schedule)).mean()

    return fit("transformer", model, loss, steps=args.steps, lr=args.lr, folder=folder, device=args.device)


# ---- judge ------------------------------------------------------------------------------------------------------


def train_judge(args, vae, folder):
    """On fresh renderings, on what the autoencoder makes of them, and a little noise: it will see generated ones."""
    torch.manual_seed(args.seed)
    judge = Judge().to(args.device)
    world = dataclasses.replace(WORLDS[args.world], two_objects=0.0)

    def loss(step):
        rng = rng_of("judge", args.seed, step + 1)
        scenes = [sample_scene(world, rng, withheld=rng.random() < 0.15) for _ in range(48)]
        images = to_tensor([draw(scene, rng) for scene in scenes]).to(args.device)
        with torch.no_grad():
            images[::2] = vae.decode(vae.encode(images[::2]))
        noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32)).to(args.device)
        answers = judge(images + 0.1 * rng.random() * noise)
        return sum(F.cross_entropy(answers[k], wanted.to(args.device)) for k, wanted in labels(scenes).items())

    return fit("judge", judge, loss, steps=args.judge_steps, lr=2e-3, folder=folder, device=args.device)


# ---- CLIP -------------------------------------------------------------------------------------------------------


def clip_tokenizer(args):
    """Byte pairs in CLIP's format, learned from captions and WORDS."""
    import tokenizers
    from transformers import CLIPTokenizer

    rng = rng_of("clip tokenizer", args.seed, 0)
    sentences = [caption(sample_scene(WORLDS[args.world], rng), rng) for _ in range(2000)]
    sentences += [" ".join(rng.choice(WORDS, 6)) for _ in range(2000)] + list(string.printable.strip())
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=800, special_tokens=special, end_of_word_suffix="</w>",
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)  # fmt: skip
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(sentences, trainer)
    learned = json.loads(backend.to_str())["model"]
    return CLIPTokenizer(learned["vocab"], [tuple(pair) for pair in learned["merges"]], model_max_length=32)


def clip_pool(args, vae):
    """Pictures and what they show, for CLIP to be trained on: half scenes, half creatures in two scenes each.

    Returns images (2·half, 3, 64, 64) as uint8, of which every other one went through the autoencoder, and scenes.
    The views of creature i are at half + 2i and half + 2i + 1.
    """
    rng, world = rng_of("clip pool", args.seed, 0), WORLDS[args.world]
    half = args.clip_pictures // 4 * 2
    scenes = [sample_scene(world, rng, withheld=rng.random() < 0.15) for _ in range(half)]
    pictures = [draw(scene, rng) for scene in tqdm(scenes, desc="scenes", disable=None)]
    for _ in tqdm(range(half // 2), desc="creatures", disable=None):
        parts = sample_creature(rng)
        for _ in range(2):
            background, place = str(rng.choice(world.colours)), str(rng.choice(world.places))
            pictures.append(draw_parts(parts, background, place, rng.uniform(0.2, 0.37), 64))
            scenes.append((background, place))
    images = to_bytes(pictures).contiguous()  # (n, 3, 64, 64)
    for start in tqdm(range(0, len(images), 100), desc="through the autoencoder", disable=None):
        part = images[start : start + 100 : 2].to(args.device).float() / 127.5 - 1
        with torch.no_grad():
            part = vae.decode(vae.encode(part)).clamp(-1, 1)
        images[start : start + 100 : 2] = ((part + 1) * 127.5).round().to(torch.uint8).cpu()
    return images, scenes


def train_clip(args, vae, folder):
    """A small CLIP: every picture is to find its caption among a batch's, every caption its picture, and every
    creature itself in another scene, so that the cosine of two pictures says whether they show the same one.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer(args)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 64}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "num_hidden_layers": 2}
    vision = {"image_size": 64, "patch_size": 8, "num_hidden_layers": 4}
    config = CLIPConfig(text_config=shape | ends | text, vision_config=shape | vision, projection_dim=64)
    torch.manual_seed(args.seed)
    model = CLIPModel(config).to(args.device)
    table = position_table(128, 8, 8, 8, 1.0)  # (64, 128): CLIP's own start, 35 times smaller, leaves places unseen
    model.vision_model.embeddings.position_embedding.weight.data[1:] = table
    images, scenes = clip_pool(args, vae)
    half = len(images) // 2
    alike = defaultdict(list)  # scenes that differ in kind and place alone, which are the hard ones to tell apart
    for i, scene in enumerate(scenes[:half]):
        alike[scene.background, scene.things[0].colour].append(i)
    groups = list(alike.values())

    def loss(step):
        rng = rng_of("clip", args.seed, step + 1)
        eight = [groups[i] for i in rng.integers(len(groups), size=8)]
        pick = np.concatenate([rng.choice(group, 6, replace=len(group) < 6) for group in eight])  # (48,)
        creatures = half + 2 * rng.choice(half // 2, 16, replace=False)
        texts = [caption(scenes[i], rng) for i in pick]
        pick = np.concatenate([pick, creatures, creatures + 1])
        texts += [subject_caption(str(rng.choice(WORDS)), *scenes[i]) for i in pick[48:]]
        pixels = images[pick].to(args.device).float() / 127.5 - 1  # (80, 3, 64, 64)
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)).to(args.device)
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(args.device)
        output = model(**tokens, pixel_values=pixels + 0.1 * rng.random() * noise)
        a, b = output.image_embeds[48:].split(16)  # (16, C): the two views of each creature
        pairs = output.logits_per_image, output.logits_per_text, 20 * a @ b.T, 20 * b @ a.T
        return sum(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)) for logits in pairs)

    model = fit("clip", model, loss, steps=args.clip_steps, lr=1e-3, folder=folder, device=args.device)
    preprocessor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3,
                                      image_std=[0.5] * 3)  # fmt: skip
    return model, tokenizer, preprocessor


# ---- the command ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(prog="python -m dit.tiny.pretrain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tiny"), help="folder for the pipeline")
    add("--work", type=Path, default=Path("runs/pretrain"), help="folder for checkpoints, caches and losses")
    add("--resume", action="store_true", help="go on with what is in --out and --work")
    add("--world", choices=WORLDS, default="small", help="what the scenes may show")
    add("--pictures", type=whole, default=30000, help="scenes that the transformer is trained on")
    add("--width", type=whole, default=128, help="of the transformer")
    add("--layers", type=whole, default=6, help="of the transformer")
    add("--batch-size", type=whole, default=64, help="of the transformer, for each process")
    add("--lr", type=positive, default=2e-3, help="of the transformer")
    add("--steps", type=whole, default=8000, help="of the transformer")
    add("--vae-steps", type=whole, default=3600)
    add("--vae-pictures", type=whole, default=12000)
    add("--text-steps", type=whole, default=1500)
    add("--judge-steps", type=whole, default=1000)
    add("--clip-steps", type=whole, default=3500)
    add("--clip-pictures", type=whole, default=16000)
    add("--seed", type=seed, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.width % (2 * HEADS):
        raise UserError(f"--width {args.width} does not split over {HEADS} heads; choose a multiple of {2 * HEADS}")
    return args


def check_folders(args):
    """Refuse folders that hold something else, and a --resume of a run with other settings."""
    free = {"out", "work", "resume", "device"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    file = args.work / "settings.json"
    if args.resume and file.exists():
        then = json.loads(file.read_text())
        for name, value in settings.items():
            if then.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{args.work} belongs to a run with {option} {then.get(name)}, not {value}")
    elif not args.resume and any(f.exists() and any(f.iterdir()) for f in (args.out, args.work)):
        raise UserError(f"{args.out} or {args.work} holds files; add --resume to go on, or name new folders")
    elif parallel.rank() == 0:
        write_json(settings, file)


def write_json(content, path):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def part(folder, load, train):
    """The part in `folder` if it is there, else trained and saved there."""
    if not (folder / "config.json").exists():
        model = train()
        if parallel.rank() == 0:
            save_part(model, folder)
    return load(folder)


def main(argv=None):
    args = parse(argv)
    need_transformers()
    parallel.start()
    check_folders(args)
    out, work = args.out, args.work
    if not (out / "tokenizer" / "spiece.model").exists():
        train_tokenizer(args, out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    vae = part(out / "vae", load_vae, lambda: train_vae(args, work)).to(args.device)
    encoder = part(out / "text_encoder", load_text_encoder, lambda: train_text(args, tokenizer, work)).to(args.device)
    judge = train_judge(args, vae, work)
    if parallel.rank() == 0:
        save_index(out)
        save_judge(judge, out / "judge", args.world)
        write_json(DEFAULTS, out / "defaults.json")
    if not (out / "clip").exists():
        clip = train_clip(args, vae, work)
        if parallel.rank() == 0:
            for saved in clip:
                saved.save_pretrained(out / ".clip")
            os.replace(out / ".clip", out / "clip")  # all of it, or nothing
    part(out / "transformer", load_transformer, lambda: train_transformer(args, vae, tokenizer, encoder, work))
    if parallel.rank() == 0:
        print(f"{out} is complete; see how good it is with: python -m dit.tiny.judge --weights {out}")


if __name__ == "__main__":
    run(main)
