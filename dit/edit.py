"""Edit one picture (§4.2): fine-tune on it, sparse and with LoRA, and draw changed prompts from the same seeds.

    python -m dit.edit --image lessons/data/subjects/robot/01.png --edit "a robot in the middle on a green background"

Writes sparse.safetensors, lora.safetensors and edit.png into --out: a row for the base model, for LoRA, for the sparse
adapter as trained, and for each --density and each number of atoms (Fig. 3, 5, 6); a column for each prompt. Its
pictures at full size are pictures/ROW-COLUMN.png. What --out holds of an earlier call is not trained again, so other
edits, densities and atoms cost their drawing alone.
"""

from pathlib import Path

from dit.cli import Parser, add_model_arguments, check_folder, load_pipeline, number, run, seed, unicode, whole
from dit.data import find_captions, load_images
from dit.diffusion import sampling_timesteps
from dit.pictures import draw_table, save_each, to_pil
from dit.sample import atom_count, variants
from dit.train import TrainConfig, model_defaults, teach
from sparsecode import detach, load_adapter, set_scale
from sparsecode.common import locked, remove_leftovers

EPOCHS = 60  # the paper's, on one picture (§4.1); a model's own come from its defaults.json
METHODS = ("lora", "sparse")
EXPECTED = "expect less of the subject, and more of what the base model draws, with fewer or sparser atoms"
OUTPUTS = {"lora.safetensors", "sparse.safetensors", "lora.pt", "sparse.pt", "edit.png", "pictures"}


def draw(pipe, prompts, noise, name, adapter=None, density=None, keep_atoms=None, scale=1.0, **options):
    """Yield (label, {prompt: one picture for each row of noise (S, 4, h, w)}) for each variant of an adapter file."""
    model = pipe.transformer
    if adapter:
        load_adapter(model, adapter)
        set_scale(model, scale)
    for words in variants(model, density, keep_atoms):
        every = [prompt for prompt in prompts for _ in noise]
        images = pipe.generate(every, latents=noise.repeat(len(prompts), 1, 1, 1), **options)
        parts = [images[start : start + len(noise)] for start in range(0, len(images), len(noise))]
        yield f"{name}, {words}" if words else name, dict(zip(prompts, parts))
    if adapter:
        detach(model)


def parse(argv=None):
    parser = Parser(prog="python -m dit.edit", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image", type=Path, required=True, help="the picture to edit")
    add("--prompt", type=unicode, help="what it shows, unless name.txt beside it says so")
    add("--edit", type=unicode, nargs="+", required=True, metavar="PROMPT", help="what it should show instead")
    add("--density", type=float, nargs="*", default=[0.01, 0.04], help="draw the sparse edit with each of these ρ")
    add("--keep-atoms", type=atom_count, nargs="*", default=[40, 400], help="and with so many of its atoms")
    add("--scale", type=float, default=1.0, help="s in O + s·ΔO: 0 for the base model, 1 as trained")
    add("--seed", type=seed, nargs="+", default=[0, 1, 2], help="of the pictures drawn: one each")
    add("--epochs", type=whole, help=f"of 10 steps or so (the model's default, or {EPOCHS})")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--steps", type=whole, default=20, help="of the sampler")
    add("--guidance", type=number, help="strength of the prompt (the model's default)")
    add("--out", type=Path, help="folder for the adapters and edit.png (runs/edit-NAME)")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / f"edit-{args.image.stem}"
    return args


def configs(pipe, args):
    """What is trained, {method: TrainConfig}; densities, numbers of atoms and a scale that cannot be are refused."""
    epochs = args.epochs or model_defaults(pipe).get("epochs", EPOCHS)
    rest = {"epochs": epochs, "gradient_checkpointing": args.gradient_checkpointing}
    found = {method: TrainConfig.of(pipe, method=method, **rest) for method in METHODS}
    found["sparse"].attach(pipe.transformer)
    set_scale(pipe.transformer, args.scale)
    list(variants(pipe.transformer, args.density))
    list(variants(pipe.transformer, None, args.keep_atoms))
    detach(pipe.transformer)
    return found


def edit(pipe, args):
    """Train both adapters, unless --out has them, draw, and return the rows of edit.png."""
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    picture = load_images([args.image], pipe.resolution)  # (1, 3, H, W)
    (caption,) = find_captions([args.image], args.prompt)
    prompts = list(dict.fromkeys([caption, *args.edit]))
    pipe.remember(["", *prompts])
    settings = configs(pipe, args)
    noise = pipe.noise(args.seed)  # (seeds, 4, h, w)
    files = {method: args.out / f"{method}.safetensors" for method in METHODS}
    with locked(args.out):
        remove_leftovers(args.out)
        for method, file in files.items():
            teach(pipe, [args.image], [caption], file, settings[method])

        ways = [{"name": "base model"}, {"name": "LoRA", "adapter": files["lora"]}]
        ways += [{"name": "sparse", "adapter": files["sparse"]}]
        ways += [{**ways[-1], "density": args.density}] if args.density else []
        ways += [{**ways[2], "keep_atoms": args.keep_atoms}] if args.keep_atoms else []
        rows = [("training picture", {caption: to_pil(picture)})]
        options = dict(scale=args.scale, steps=args.steps, guidance=args.guidance)
        for way in ways:
            rows += draw(pipe, prompts, noise, **options, **way)
        draw_table(rows, args.out / "edit.png", "fine-tuned on one picture, then drawn from changed prompts")
        save_each([(label, sum(drawn.values(), [])) for label, drawn in rows], args.out / "pictures")
    return rows


def main(argv=None):
    args = parse(argv)
    check_folder(args.out, OUTPUTS)
    rows = edit(load_pipeline(args), args)
    print(f"{len(rows) - 1} rows in {args.out}/edit.png: {EXPECTED}")


if __name__ == "__main__":
    run(main)
