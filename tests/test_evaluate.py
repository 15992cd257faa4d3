"""The study of many subjects: what it reads, chooses, writes and leaves alone, in one process and in two."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_metrics import write_clip, write_image_reward
from vendi_score import vendi

from dit import evaluate, parallel, report
from dit import study as studies
from dit import train as training
from dit.dreambooth import Subject, read_prompts, read_subjects, sentence
from dit.metrics import CLIP, ImageReward
from dit.pictures import open_picture, square
from dit.pipeline import Pipeline
from dit.study import Job, Setting, Study, StudyConfig
from dit.train import Diverged
from sparsecode import adapters, load_adapter
from sparsecode.common import UserError, locked

ROOT = Path(__file__).parent.parent

CLASSES = """\
Classes

subject_name,class
blob,stuffed animal
puss,cat
rex_2,dog
owl,owl

Prompts

"""
OBJECTS = """\
Object Prompts

prompt_list = [
'a {0} {1} on the left'.format(unique_token, class_token),
"a red {0} {1} that isn't blue".format(unique_token, class_token),
'a {1} on a star'.format(unique_token, class_token)
]
"""
LIVE = """
Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a {0} {1} on the right'.format(unique_token, class_token),
]
"""


def write_pictures(folder, colours):
    folder.mkdir()
    for i, colour in enumerate(colours):
        image = Image.new("RGB", (20, 20 + i), colour)
        image.paste("white", (3 * i, 4, 3 * i + 6, 12))
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four subjects: owl with a file for each caption, puss with a metadata.jsonl, blob and rex_2 without captions."""
    folder = tmp_path_factory.mktemp("subjects")
    (folder / "prompts_and_classes.txt").write_text(CLASSES + OBJECTS + LIVE)
    (folder / ".cache").mkdir()
    write_pictures(folder / "blob", ["red", "green"])
    owl = write_pictures(folder / "owl", ["blue", "orange"])
    for i in range(2):
        (owl / f"{i}.txt").write_text(f"an owl, number {i}\n")
    lines = [json.dumps({"file_name": "0.png", "text": "my puss"})]
    (write_pictures(folder / "puss", ["yellow"]) / "metadata.jsonl").write_text("\n".join(lines))
    write_pictures(folder / "rex_2", ["purple"])
    return folder


# ---- subjects and their prompts ---------------------------------------------------------------------------------


def test_dreambooths_file(folder):
    classes, objects, live = read_prompts(folder / "prompts_and_classes.txt")
    assert classes == {"blob": "stuffed animal", "puss": "cat", "rex_2": "dog", "owl": "owl"}
    assert objects == ["a {0} {1} on the left", "a red {0} {1} that isn't blue", "a {1} on a star"]
    assert live == ["a {0} {1} wearing a red hat", "a {0} {1} on the right"]


def test_a_file_without_live_subjects_or_with_other_line_ends(folder, tmp_path):
    file = tmp_path / "prompts_and_classes.txt"
    file.write_text(CLASSES + OBJECTS)
    classes, objects, live = read_prompts(file)
    assert live == objects == read_prompts(folder / file.name)[1]
    file.write_bytes((CLASSES + OBJECTS + LIVE).replace("\n", "\r\n").encode())
    assert read_prompts(file) == read_prompts(folder / file.name)


@pytest.mark.parametrize("template, token, kind, expected", [
    ("a {0} {1} in the snow", "sks", "stuffed animal", "a sks stuffed animal in the snow"),
    ("a {0} {1} in the snow", "", "stuffed animal", "a stuffed animal in the snow"),
    ("a {0} {1} on an orange star", "", "owl", "an owl on an orange star"),
    ("a {0} {1}", "sks", "owl", "a sks owl"),
    ("a {1} on a island", "", "umbrella", "an umbrella on an island"),
    ("a red {0} {1} of papa octopus", "", "owl", "a red owl of papa octopus"),
])  # fmt: skip
def test_sentences(template, token, kind, expected):
    assert sentence(template, token, kind) == expected


def test_subjects_with_and_without_captions(folder):
    """A subject whose captions name it is drawn by these words; one that has none by "sks", which CLIP is not told."""
    blob, owl, puss, rex = subjects = read_subjects(folder)
    assert [subject.name for subject in subjects] == ["blob", "owl", "puss", "rex_2"]
    assert [file.name for file in blob.files] == ["0.png", "1.png"] and blob.files[0].parent == folder / "blob"
    assert blob.captions == ["a sks stuffed animal"] * 2
    assert blob.prompts == ["a sks stuffed animal on the left", "a red sks stuffed animal that isn't blue",
                            "a stuffed animal on a star"]  # fmt: skip
    assert blob.texts == ["a stuffed animal on the left", "a red stuffed animal that isn't blue",
                          "a stuffed animal on a star"]  # fmt: skip
    assert owl.captions == ["an owl, number 0", "an owl, number 1"]
    assert owl.prompts == owl.texts == ["an owl on the left", "a red owl that isn't blue", "an owl on a star"]
    assert puss.captions == ["my puss"]
    assert puss.prompts == puss.texts == ["a cat wearing a red hat", "a cat on the right"]
    assert rex.prompts == ["a sks dog wearing a red hat", "a sks dog on the right"]
    assert rex.texts == ["a dog wearing a red hat", "a dog on the right"]


def test_the_shipped_subjects():
    subjects = {subject.name: subject for subject in read_subjects(ROOT / "lessons" / "data" / "subjects")}
    assert sorted(subjects) == ["cat", "owl", "robot", "rocket", "snail"]
    for name, subject in subjects.items():
        assert len(subject.files) == 5 and len(set(subject.captions)) == 5
        assert subject.prompts == subject.texts and len(set(subject.texts)) == 25
    assert "an owl at the top left on a red background" in subjects["owl"].texts


def test_a_picture_that_lacks_its_caption(folder, tmp_path):
    shutil.copy(folder / "prompts_and_classes.txt", tmp_path)
    shutil.copytree(folder / "owl", tmp_path / "owl")
    (tmp_path / "owl" / "1.txt").unlink()
    with pytest.raises(UserError, match="1.png has no caption"):
        read_subjects(tmp_path)


# ---- settings ---------------------------------------------------------------------------------------------------


def test_settings_are_a_star():
    """Densities with the first number of atoms, numbers of atoms with the first density, and each once."""
    config = StudyConfig(("sparse", "lora", "oft"), densities=(0.02, 0.04), atoms=(256, 16, 1024))
    assert config.settings() == [
        Setting("base"), Setting("sparse", 256, 0.02), Setting("sparse", 256, 0.04), Setting("sparse", 16, 0.02),
        Setting("sparse", 1024, 0.02), Setting("lora"), Setting("oft"),
    ]  # fmt: skip
    config = StudyConfig(("lora", "sparse", "lora"), densities=(0.5, 0.5), atoms=(8, 8))
    assert config.settings() == [Setting("base"), Setting("lora"), Setting("sparse", 8, 0.5)]


# ---- the choice of a learning rate ------------------------------------------------------------------------------


def plain_subject(name):
    return Subject(name, [], [], [], [])


def write_record(study, job, **scores):
    record = {"subject": job.subject.name, "method": job.setting.method, "parameters": 1, **scores}
    study.file(job).parent.mkdir(exist_ok=True)
    study.file(job).write_text(json.dumps(record | {"checksum": job.subject.checksum()}))


@pytest.fixture
def tuned(tmp_path, monkeypatch, capsys):
    """Choose with given (alignment, fidelity) for each (method, lr) and held-out subject; returns rates and jobs."""

    def choose(scores, **more):
        done = []

        def do(self, job, may_diverge):
            assert may_diverge
            done.append((job.setting, job.subject.name, job.lr, job.seed))
            alignment, fidelity = scores[job.setting.method, job.lr][job.subject.name]
            write_record(self, job, alignment=alignment, diversity=50 * job.lr, fidelity=fidelity)

        monkeypatch.setattr(Study, "do", do)
        config = StudyConfig(("sparse", "lora"), atoms=(256, 16), lrs=(0.1, 0.2, 0.3), tune_on=("b", "c"), seeds=(7, 8))
        subjects = [plain_subject(name) for name in "abcd"]
        return Study(None, subjects, replace(config, **more), tmp_path, clip=None).tune(), done

    return choose


BAD, GOOD = {"b": (0.1, 0.1), "c": (0.1, 0.1)}, {"b": (0.2, 0.3), "c": (0.2, 0.3)}


def test_the_learning_rate_of_the_highest_alignment_and_fidelity(tuned, capsys):
    """Their sum over the held-out subjects decides, neither of them alone nor one subject nor diversity."""
    scores = {
        ("sparse", 0.1): {"b": (0.9, 0.0), "c": (0.0, 0.2)},
        ("sparse", 0.2): {"b": (0.5, 0.5), "c": (0.1, 0.1)},
        ("sparse", 0.3): {"b": (0.0, 0.9), "c": (0.0, 0.2)},
        ("lora", 0.1): GOOD, ("lora", 0.2): BAD, ("lora", 0.3): BAD,
    }  # fmt: skip
    rates, done = tuned(scores)
    assert rates == {"sparse": 0.2, "lora": 0.1}
    firsts, lrs = (Setting("sparse", 256, 0.02), Setting("lora")), (0.1, 0.2, 0.3)
    assert len(done) == 12 and set(done) == {(s, name, lr, 7) for s in firsts for name in "bc" for lr in lrs}
    lora, sparse = sorted(capsys.readouterr().out.splitlines())
    assert sparse == "sparse: learning rate 0.2 (alignment + fidelity on b, c: 0.1: 0.550, 0.2: 0.600, 0.3: 0.550)"
    assert lora.startswith("lora: learning rate 0.1 (")


def test_a_learning_rate_that_diverged_for_one_subject_is_not_chosen(tuned):
    scores = {
        ("lora", 0.1): BAD,
        ("lora", 0.2): GOOD,
        ("lora", 0.3): {"b": (None, None), "c": (0.9, 0.9)},
    }
    assert tuned(scores, methods=("lora",))[0] == {"lora": 0.2}


def test_one_learning_rate_needs_no_choice(tuned, capsys):
    rates, done = tuned({}, lrs=(0.5,), tune_on=())
    assert rates == {"sparse": 0.5, "lora": 0.5} and done == [] and capsys.readouterr().out == ""


# ---- scores and sums --------------------------------------------------------------------------------------------


class Reader:
    """Stands for CLIP or DINOv2: a picture's vector is one of the basis, named by its colour; a text's by its word."""

    def __init__(self, *names, channels=5):
        self.names, self.basis = names, torch.eye(channels)

    def texts(self, texts):
        return self.basis[[self.names.index(text) for text in texts]]  # (n, C)

    def images(self, images):
        return self.texts([min(self.names, key=lambda name: distance(image, name)) for image in images])


def distance(image, colour):
    return np.abs(np.subtract(image.getpixel((8, 1)), Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).sum()


def diversity(*counts):
    """exp of the entropy of how many pictures there are of each kind."""
    shares = np.array(counts) / sum(counts)
    return pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_scores_of_a_job(folder):
    """Two pictures of each prompt beside their text; fidelity to the training pictures; diversity by DINOv2 alone."""
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "red", "green", "red", "blue", "red")]
    subject = read_subjects(folder)[0]  # red and green
    subject.texts = ["red", "green", "blue"]
    clip, dino = Reader("red", "green", "blue"), Reader("red", "green")  # which takes blue for green
    study = Study(Namespace(resolution=16), [subject], StudyConfig(pictures=2), folder, clip=clip)
    scores = study.score(subject, pictures)
    assert scores == {"alignment": pytest.approx(4 / 6), "diversity": diversity(4, 1, 1),
                      "fidelity": pytest.approx(5 / 12)}  # fmt: skip
    study.dino = dino
    assert study.score(subject, pictures) == scores | {"diversity": diversity(4, 2)}


def test_every_job_draws_from_the_same_noise():
    """Pictures of one prompt side by side, each from a seed of its own."""

    class Pipe:
        def noise(self, seeds):
            return list(seeds)

        def generate(self, prompts, *, latents, steps, guidance):
            return list(zip(prompts, latents)), steps, guidance

    study = Study(Pipe(), [], StudyConfig(pictures=2, steps=9, guidance=1.5), "", clip=None)
    assert study.draw(["a", "b"]) == ([("a", 0), ("a", 1), ("b", 2), ("b", 3)], 9, 1.5)


def test_processes_share_the_jobs(tmp_path, monkeypatch):
    """What is not done yet, each job once."""
    done = {0: [], 1: []}
    monkeypatch.setattr(parallel, "wait", lambda: None)
    monkeypatch.setattr(Study, "do", lambda self, job, may_diverge: done[rank].append(job))
    monkeypatch.setenv("WORLD_SIZE", "2")
    study = Study(None, [], StudyConfig(), tmp_path, clip=None)
    jobs = [Job(Setting("lora"), plain_subject("a"), 0.5, seed) for seed in range(6)]
    write_record(study, jobs[2], alignment=0.5, diversity=1.0, fidelity=0.5)
    for rank in done:
        monkeypatch.setenv("RANK", str(rank))
        study.run(jobs, "customization")
    assert [job.seed for job in done[0]] == [0, 3, 5] and [job.seed for job in done[1]] == [1, 4]


def test_compare_is_paired():
    one, other = Setting("sparse", 8, 0.5), Setting("lora")
    rng, records = np.random.default_rng(0), []
    values = rng.random((2, 3, 2))  # (settings, subjects, seeds)
    for i, setting in enumerate((one, other)):
        for subject, seed in np.ndindex(3, 2):
            records.append({"method": setting.method, "atoms": setting.atoms, "density": setting.density,
                            "subject": str(subject), "seed": seed, "fidelity": values[i, subject, seed]})  # fmt: skip
    rng.shuffle(records)
    gaps = (values[0] - values[1]).ravel()  # (6,)
    expected = gaps.mean(), gaps.std(ddof=1) / 6**0.5
    assert report.compare(records, "fidelity", one, other) == pytest.approx(expected)
    assert report.compare(records, "fidelity", other, one) == pytest.approx((-expected[0], expected[1]))


def test_pictures_shown_are_spread_over_all():
    assert studies.spread(range(25)) == range(0, 25, 4)
    for n in range(1, 40):
        assert 1 <= len(studies.spread(range(n))) <= 7 and studies.spread(range(n))[0] == 0


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("evaluate") / "clip")


@pytest.fixture(scope="module")
def options(tiny, folder, clip):
    return ["--weights", tiny, "--device", "cpu", "--subjects", folder, "--clip", clip, "--quick"]


def call(options, *more):
    evaluate.main([*map(str, options), *map(str, more)])


ALL = ["--methods", "sparse", "lora", "--densities", 0.25, 0.5, "--atoms", 8, 16, "--seeds", 0, 3]
LABELS = ["base", "sparse, M 8, ρ 0.25", "sparse, M 8, ρ 0.5", "sparse, M 16, ρ 0.25", "lora"]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A whole study, which the tests only read: two subjects, five settings, two seeds."""
    out = tmp_path_factory.mktemp("finished") / "new" / "out"
    call(options, *ALL, "--out", out)
    return out


@pytest.fixture
def no_plots(monkeypatch):
    for name in ("plot_methods", "plot_sweep", "draw_table"):
        monkeypatch.setattr(report, name, lambda *_: None)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def read_csv(file):
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_what_is_written(finished):
    names = ["adapters", "atoms.png", "density.png", "methods.png", "pictures.png", "results", "results.csv",
             "settings.json", "table.csv", "table.md"]  # fmt: skip
    assert sorted(os.listdir(finished)) == names
    jobs = {f"{subject}-{setting}-lr0.01-seed{seed}" for subject in ("blob", "owl") for seed in (0, 3)
            for setting in ("sparse-8-0.25", "sparse-8-0.5", "sparse-16-0.25", "lora")}  # fmt: skip
    assert set(os.listdir(finished / "adapters")) == {f"{job}.safetensors" for job in jobs}
    every = jobs | {"blob-base", "owl-base"}
    assert set(os.listdir(finished / "results")) == {job + end for job in every for end in (".json", ".png")}
    with Image.open(finished / "pictures.png") as picture:
        assert picture.height > 6 * 100  # training pictures and five settings
    for name, least in (("methods", 700), ("density", 1000), ("atoms", 1000)):
        with Image.open(finished / f"{name}.png") as plot:
            assert plot.width >= least and len(plot.convert("RGB").getcolors(10**6)) > 50


def test_the_table_is_of_the_results(finished):
    results = read_csv(finished / "results.csv")
    assert len(results) == 2 + 4 * 2 * 2
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in open(finished / "table.md")]
    assert lines.pop() == [report.LEFT_OUT] and lines.pop() == [""]
    assert [line[0] for line in lines] == ["", "---", *LABELS]
    assert lines[0][1:6] == ["lr", "parameters", "alignment", "diversity", "fidelity"]
    assert {len(line) for line in lines} == {9}
    for row, line in zip(read_csv(finished / "table.csv"), lines[2:]):
        own = [r for r in results if all(r[name] == row[name] for name in ("method", "atoms", "density"))]
        assert {(r["subject"], r["seed"]) for r in own} == {
            (subject, seed) for subject in ("blob", "owl") for seed in ([""] if row["method"] == "base" else ["0", "3"])
        }
        assert {r["lr"] for r in own} == {row["lr"]} and line[1] == row["lr"]
        assert {r["parameters"] for r in own} == {row["parameters"]} and line[2].replace(",", "") == row["parameters"]
        for score, cell in zip(studies.SCORES[:3], line[3:]):
            seeds = sorted({r["seed"] for r in own})
            means = [np.mean([float(r[score]) for r in own if r["seed"] == seed]) for seed in seeds]
            assert float(row[score]) == pytest.approx(np.mean(means), rel=1e-12)
            if row["method"] == "base":
                assert row[f"{score}_std"] == "" and cell == f"{np.mean(means):.3f}"
            else:
                assert float(row[f"{score}_std"]) == pytest.approx(np.std(means, ddof=1), rel=1e-9)
                assert cell == f"{np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}"
        assert line[6:] == (["0.218", "4.707", "0.711"] if row["method"] == "lora" else ["", "", ""])


@pytest.mark.parametrize("name", ["blob-base", "owl-sparse-8-0.5-lr0.01-seed3", "blob-lora-lr0.01-seed0"])
def test_a_result_is_what_its_adapter_draws(finished, tiny, clip, folder, name):
    """Drawn and scored again, from the files alone."""
    record = json.loads((finished / "results" / f"{name}.json").read_text())
    (row,) = [r for r in report.read_results(finished / "results.csv") if all(r[k] == v for k, v in record.items())]
    assert row == record
    pipe, reader = Pipeline.from_folder(tiny, device="cpu"), CLIP(clip)
    trained = 0
    if record["method"] != "base":
        load_adapter(pipe.transformer, finished / "adapters" / f"{name}.safetensors")
        tensors = load_file(finished / "adapters" / f"{name}.safetensors")
        trained = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("usage"))
    assert record["parameters"] == trained
    subject = {s.name: s for s in read_subjects(folder)}[record["subject"]]
    pictures = pipe.generate(subject.prompts[:2], steps=4, seed=0)
    strip = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
    np.testing.assert_array_equal(np.asarray(open_picture(finished / "results" / f"{name}.png")), strip)
    drawn, texts = reader.images(pictures).double().numpy(), reader.texts(subject.texts[:2]).double().numpy()
    originals = reader.images([square(open_picture(file), 16) for file in subject.files]).double().numpy()
    assert record["alignment"] == pytest.approx((drawn * texts).sum(1).mean(), abs=1e-6)
    assert record["fidelity"] == pytest.approx((drawn @ originals.T).mean(), abs=1e-6)
    assert record["diversity"] == pytest.approx(vendi.score_X(drawn, normalize=False), abs=1e-6)


def test_adapters_differ_by_what_their_names_say(finished):
    files = sorted((finished / "adapters").glob("*.safetensors"))
    contents = {tuple(float(t.double().sum()) for t in load_file(file).values()) for file in files}
    assert len(contents) == len(files) == 16


def test_a_second_call_does_nothing_again(options, copied, capsys, monkeypatch, no_plots):
    monkeypatch.setattr(studies, "teach", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(Study, "draw", lambda *_: pytest.fail("drawn again"))
    before = {name: (copied / name).read_bytes() for name in ("table.md", "table.csv", "results.csv")}
    for name in before:
        (copied / name).unlink()
    call(options, *ALL, "--out", copied)
    assert {name: (copied / name).read_bytes() for name in before} == before
    assert capsys.readouterr().out.encode() == before["table.md"]


def test_a_killed_study_goes_on(options, finished, copied, monkeypatch, no_plots):
    """Of what is lost only that is done again, and a training whose adapter is there is not."""
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    for name in ("owl-base", "blob-sparse-8-0.25-lr0.01-seed3"):
        (copied / "results" / f"{name}.json").unlink()
    drawn, real = [], Study.draw
    monkeypatch.setattr(Study, "draw", lambda self, prompts: drawn.append(prompts) or real(self, prompts))
    call(options, *ALL, "--out", copied)
    assert len(drawn) == 2
    for name in ("table.md", "results.csv"):
        assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_more_settings_are_added(options, copied, monkeypatch, no_plots):
    """Fewer seeds and another method: what is there serves, and only what is new is trained."""
    trained, real = [], studies.teach
    monkeypatch.setattr(studies, "teach", lambda *a: trained.append((a[-1].method, a[-1].seed)) or real(*a))
    call(options, "--methods", "lora", "dora", "--seeds", 3, "--out", copied)
    assert trained == [("dora", 3)] * 2
    assert [row["method"] for row in read_csv(copied / "table.csv")] == ["base", "lora", "dora"]


def change_a_number(file):
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("more, words", [
    (["--guidance", 3], "--guidance None, not 3.0"), (["no quick"], "--epochs 1"),
    (["--clip", "{tmp}/clip"], "--clip of checksum"), (["--weights", "{tmp}/weights"], "--weights of checksum"),
])  # fmt: skip
def test_results_of_other_settings_are_refused(options, finished, tiny, clip, tmp_path, more, words):
    for whole, file in ((clip, "clip/model"), (tiny, "weights/transformer/diffusion_pytorch_model")):
        shutil.copytree(whole, tmp_path / file.partition("/")[0])
        change_a_number(tmp_path / f"{file}.safetensors")
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    more = [str(word).format(tmp=tmp_path) for word in more]
    changed = options[:-1] if more == ["no quick"] else [*options, *more]
    with pytest.raises(UserError, match=f"holds results with {words}.*use another --out"):
        call(changed, *ALL, "--out", finished)
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


@pytest.fixture
def own_subjects(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "subjects")


def test_weights_and_subjects_may_move(options, copied, tiny, own_subjects, tmp_path, monkeypatch, no_plots):
    """What counts is what they hold."""
    monkeypatch.setattr(studies, "teach", lambda *_, **__: pytest.fail("trained again"))
    shutil.copytree(tiny, tmp_path / "weights")
    call(options, *ALL, "--out", copied, "--weights", tmp_path / "weights", "--subjects", own_subjects)


@pytest.mark.parametrize("change", ["picture", "caption", "prompt"])
def test_results_of_other_subjects_are_not_passed_off(options, copied, own_subjects, change, monkeypatch):
    monkeypatch.setattr(studies, "teach", lambda *_, **__: pytest.fail("trained again"))
    before = {file: file.read_bytes() for file in copied.rglob("*.*")}
    if change == "picture":
        Image.new("RGB", (20, 20), "pink").save(own_subjects / "owl" / "0.png")
    elif change == "caption":
        (own_subjects / "owl" / "0.txt").write_text("an owl, the first")
    else:
        file = own_subjects / "prompts_and_classes.txt"
        file.write_text(file.read_text().replace("owl,owl", "owl,bird"))
    with pytest.raises(UserError, match="owl.*of other pictures, captions or prompts of owl; use another --out"):
        call(options, *ALL, "--out", copied, "--subjects", own_subjects)
    after = {file: file.read_bytes() for file in copied.rglob("*.*")}
    assert before == after


def test_a_second_study_in_the_same_folder_is_refused(options, copied, mistake, no_plots):
    """While the first one runs; then the folder is free again."""
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*")}
    with locked(copied):
        assert f"another run is writing to {copied}" in mistake(evaluate, *options, *ALL, "--out", copied)
    assert {file: file.stat().st_mtime_ns for file in copied.rglob("*")} == before
    call(options, *ALL, "--out", copied)


def test_what_a_kill_leaves_is_swept(options, finished, copied, monkeypatch, no_plots):
    """Half-written files in each folder, and the checkpoint of a training that had ended."""
    monkeypatch.setattr(studies, "teach", lambda *_, **__: pytest.fail("trained again"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (".{}.settings.json", "results/.{}.owl-base.json", "adapters/.{}.owl-lora.safetensors"):
        (copied / name.format(dead.pid)).write_text("{")
    (copied / "adapters" / "owl-lora-lr0.01-seed0.pt").write_text("no longer needed")
    (copied / "adapters" / "owl-dora-lr0.01-seed0.pt").write_text("of a training that goes on later")
    call(options, *ALL, "--out", copied)
    left = {str(file.relative_to(copied)) for file in copied.rglob("*")}
    kept = {str(file.relative_to(finished)) for file in finished.rglob("*")}
    assert left == kept | {"adapters/owl-dora-lr0.01-seed0.pt"}


def test_a_study_killed_while_it_wrote_its_settings(options, tmp_path, monkeypatch):
    """Its folder holds half a file, and is used again."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".99999999.settings.json").write_text('{"weights": ')
    monkeypatch.setattr(Study, "tune", lambda study: {})
    monkeypatch.setattr(Study, "jobs", lambda *_: [])
    monkeypatch.setattr(evaluate, "write_report", lambda *_: "")
    call(options, "--out", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["settings.json"]


@pytest.mark.parametrize("name, text", [
    ("settings.json", "[]"), ("settings.json", "{"), ("settings.json", '"\\ud800"'),
    ("results/owl-base.json", "[1]"), ("results/owl-base.json", "{}"), ("results/owl-base.json", ""),
    ("results/owl-base.json", '{"subject": "owl", "method": "base", "parameters": "many", "checksum": 1}'),
])  # fmt: skip
def test_damaged_json(options, copied, name, text, mistake):
    (copied / name).write_text(text)
    assert str(copied / name) in mistake(evaluate, *options, *ALL, "--out", copied)


def test_prompts_that_matplotlib_would_set_as_formulas(options, own_subjects, tmp_path):
    file = own_subjects / "prompts_and_classes.txt"
    file.write_text(file.read_text().replace("a {0} {1} on the left", r"a {0} {1} $\foo$ on the left"))
    call(options, "--methods", "lora", "--out", tmp_path / "out", "--subjects", own_subjects)
    assert (tmp_path / "out" / "pictures.png").exists()


def test_a_terminal_that_cannot_show_greek(options, copied, monkeypatch, no_plots):
    """The table has ρ in it."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252", write_through=True))
    evaluate.run(lambda: call(options, *ALL, "--out", copied))
    assert b"| sparse, M 8, ? 0.25 |" in shown.getvalue()
    assert "| sparse, M 8, ρ 0.25 |" in (copied / "table.md").read_text(encoding="utf-8")


def test_t5_is_alone_in_memory(options, copied, loaded, no_plots):
    """It is by far the largest part. What it has encoded is remembered."""
    (copied / "results" / "owl-lora-lr0.01-seed0.json").unlink()
    call(options, *ALL, "--out", copied)
    assert loaded.pop(0) == {"text_encoder"} and loaded
    assert all("text_encoder" not in parts for parts in loaded)


def test_image_reward_is_a_column(options, copied, finished, folder, tmp_path, monkeypatch, no_plots, capsys):
    """Added to results that lack it without training again, and left out again; the table says which."""
    monkeypatch.setattr(studies, "teach", lambda *_, **__: None)
    rewards = write_image_reward(tmp_path / "rewards")
    call(options, *ALL, "--out", copied, "--image-reward", rewards)
    table = capsys.readouterr().out
    assert "ImageReward is left out" not in table and table == (copied / "table.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    column = lines[0].index("image_reward")
    assert [line[-1] for line in lines if line[0] in ("", "lora", "base")] == ["paper: image_reward", "", "0.220"]

    model, means = ImageReward(rewards), []
    for subject in read_subjects(folder)[:2]:
        pictures = open_picture(copied / "results" / f"{subject.name}-base.png")  # both prompts', side by side
        pictures = [pictures.crop((x, 0, x + 16, 16)) for x in (0, 16)]
        means += model.scores(subject.texts[:2], pictures).tolist()
    (base,) = [line for line in lines if line[0] == "base"]
    assert float(base[column]) == pytest.approx(np.mean(means), abs=6e-4)

    call(options, *ALL, "--out", copied)
    assert capsys.readouterr().out == (finished / "table.md").read_text()


def test_the_quick_study_is_small_and_keeps_the_held_out_subjects(options, monkeypatch, tmp_path):
    """Two subjects for the table, whichever is held out."""
    seen = []
    monkeypatch.setattr(Study, "tune", lambda study: seen.extend(study.subjects) or {"lora": 0.1})
    monkeypatch.setattr(Study, "run", lambda self, jobs: seen.append([job.subject.name for job in jobs]))
    monkeypatch.setattr(evaluate, "write_report", lambda *_: "")
    tune = ["--methods", "lora", "--lrs", 0.1, 0.2]
    for held_out, counted in (("blob", ["owl", "puss"]), ("rex_2", ["blob", "owl"])):
        seen.clear()
        call(options, *tune, "--tune-on", held_out, "--out", tmp_path / held_out)
        assert seen.pop() == counted * 2 and len(seen) == 3
        assert all(len(subject.prompts) == len(subject.texts) == 2 for subject in seen)


def test_what_is_asked_for_holds_in_the_quick_study_too():
    args = evaluate.parse(["--subjects", "x", "--quick", "--pictures", "3", "--steps", "20"])
    assert (args.epochs, args.pictures, args.steps, args.quick) == (1, 3, 20, True)
    args = evaluate.parse(["--subjects", "x", "--quick"])
    assert (args.epochs, args.pictures, args.steps) == (1, 1, 4)


def test_a_real_divergence(options, finished, tmp_path, capsys, no_plots, mistake):
    """While tuning it costs that learning rate alone, and leaves no trace; afterwards it ends the study."""
    methods = ["--methods", "lora", "--seeds", 0]
    call(options, *methods, "--lrs", 1e30, 0.01, "--tune-on", "puss", "--out", tmp_path / "out")
    assert capsys.readouterr().out.startswith("lora: learning rate 0.01 (alignment + fidelity on puss: 1e+30: -inf, ")
    record = json.loads((tmp_path / "out" / "results" / "puss-lora-lr1e+30-seed0.json").read_text())
    assert [record[score] for score in studies.SCORES[:3]] == [None] * 3
    ours = read_csv(tmp_path / "out" / "results.csv")
    theirs = [row for row in read_csv(finished / "results.csv") if row in ours]
    assert ours == theirs and len(ours) == 4 and "puss" not in {row["subject"] for row in ours}

    line = mistake(evaluate, *options, *methods, "--lrs", 1e30, "--out", tmp_path / "other")
    assert "the loss became" in line
    assert not (tmp_path / "other" / "table.md").exists()
    assert not list((tmp_path / "other" / "results").glob("*lora*"))


def test_a_learning_rate_that_diverged_is_not_tried_again(tmp_path, monkeypatch):
    """While tuning, that is; chosen by the user it ends the study."""
    model, job = torch.nn.Identity(), Job(Setting("lora"), plain_subject("a"), 0.5, 0)
    pipe = Namespace(folder=tmp_path, transformer=model, defaults={}, resolution=16, multiple=4)
    study = Study(pipe, [job.subject], StudyConfig(), tmp_path, clip=None)

    def diverge(*_, **__):
        raise Diverged("the loss became nan")

    monkeypatch.setattr(studies, "teach", diverge)
    with pytest.raises(Diverged):
        study.run([job], "customization")
    study.run([job], "tuning", may_diverge=True)
    with pytest.raises(Diverged):  # what tuning left behind does not stand for a result
        study.run([job], "customization")
    monkeypatch.setattr(studies, "teach", lambda *_, **__: pytest.fail("trained again"))
    study.run([job], "tuning", may_diverge=True)
    assert study.worth(job) == -np.inf and not adapters(model)


def test_two_processes_give_the_same(options, finished, tmp_path):
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--methods", "lora", "--seeds", 0, "--out", tmp_path / "out"]
    result = subprocess.run([*runner, "-m", "dit.evaluate", *map(str, [*options, *more])], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == (tmp_path / "out" / "table.md").read_text()
    ours = report.read_results(tmp_path / "out" / "results.csv")
    theirs = report.read_results(finished / "results.csv")
    theirs = [r for r in theirs if r["method"] == "base" or (r["method"], r["seed"]) == ("lora", 0)]
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, abs=1e-6)


# ---- mistakes ---------------------------------------------------------------------------------------------------


# Arguments (after good ones, which they override) and words of the line that they must give.
MISTAKES = {
    "--subjects {tmp}/absent": "prompts_and_classes.txt is missing or not UTF-8",
    "--subjects {tmp}/latin/prompts_and_classes.txt": "prompts_and_classes.txt is missing or not UTF-8",
    "--guidance nan": "'nan' is not a finite number",
    "--subjects {tmp}/no_prompts": "prompts_and_classes.txt is missing or not UTF-8",
    "--subjects {tmp}/latin": "prompts_and_classes.txt is missing or not UTF-8",
    "--subjects {tmp}/no_class": "names no class for dragon; add a line dragon,<class>",
    "--subjects {tmp}/no_list": "lists no classes or no prompts",
    "--subjects {tmp}/no_folders": "holds no folders of pictures",
    "--subjects {tmp}/no_pictures": "holds no pictures",
    "--tune-on nobody --lrs 0.1 0.2": "--tune-on nobody: there is no such subject; choose from blob, owl, puss, rex_2",
    "--lrs 0.1 0.2": "belong together",
    "--tune-on owl": "belong together",
    "--tune-on owl --lrs 0.1": "belong together",
    "--tune-on puss owl blob rex_2 --lrs 0.1 0.2": "names every subject",
    "--lrs 0": "above 0",
    "--methods magic": "invalid choice",
    "--densities 0": "density=0.0",
    "--densities 0.5 2": "density=2.0",
    "--atoms 8 7": "atoms=7 does not split over 2 heads",
    "--atoms 0": "above 0",
    "--seeds -1": "0 or more",
    "--steps 1000": "expected 1 to 999",
    "--pictures 0": "above 0",
    "--epochs 0": "above 0",
    "--clip {tmp}/absent": "is not a folder",
    "--clip {tmp}/no_list": "cannot be read as a CLIPModel",
    "--dino {tmp}/absent": "is not a folder",
    "--image-reward {tmp}/absent": "is not a folder",
    "--image-reward {tmp}/no_list": "med_config.json cannot be read",
    "--weights {tmp}/absent": "is not a folder",
    "--weights {tmp}": "has no folder transformer/",
    "--device cuda:99": "cannot be used",
    "--out {tmp}/foreign": "holds other files",
    "--out {tmp}/settings": "holds other files",
    "--out {tmp}/foreign/thesis.doc": "thesis.doc is not a folder you can write to",
    "--out {tmp}/foreign/thesis.doc/run": "thesis.doc is not a folder you can write to",
}


@pytest.fixture
def bad(folder, tmp_path):
    """Folders that are not as they should be."""
    for name in ("no_prompts", "latin", "no_class", "no_list", "no_folders", "no_pictures"):
        (tmp_path / name).mkdir()
        if name not in ("no_prompts", "latin", "no_list"):
            shutil.copy(folder / "prompts_and_classes.txt", tmp_path / name)
    shutil.copytree(folder / "owl", tmp_path / "no_prompts" / "owl")
    shutil.copytree(folder / "owl", tmp_path / "no_class" / "dragon")
    (tmp_path / "latin" / "prompts_and_classes.txt").write_bytes(b"K\xe4fer,Tier")
    (tmp_path / "no_list" / "prompts_and_classes.txt").write_text(CLASSES)
    (tmp_path / "no_pictures" / "owl").mkdir()
    for name in ("foreign", "settings"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text('{"world": "small"}' if name == "settings" else "mine")
    (tmp_path / "foreign" / "settings.json").rename(tmp_path / "foreign" / "thesis.doc")
    return tmp_path


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(options, bad, monkeypatch, arguments, mistake):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(studies, "teach", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.setattr(Study, "draw", lambda *_: pytest.fail("work was done"))
    before = sorted(bad.rglob("*"))
    whole = [word for word in options if word != "--quick"]
    more = [word.format(tmp=bad) for word in arguments.split()]
    assert MISTAKES[arguments] in mistake(evaluate, *whole, "--out", bad / "run", *more)
    assert sorted(bad.rglob("*")) == before
