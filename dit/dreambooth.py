"""Read subjects and their prompts from a folder in DreamBooth's layout (Ruiz et al., 2023).

It holds prompts_and_classes.txt and a folder of pictures for each subject. Captions beside the pictures are optional.
"""

import re
import zlib
from dataclasses import dataclass

from dit.data import find_captions, find_pictures
from sparsecode.common import UserError

PROMPTS = "prompts_and_classes.txt"
TOKEN = "sks"  # names a subject whose pictures have no captions
LIVE = ("cat", "dog")  # classes of DreamBooth's live subjects, which have prompts of their own


@dataclass
class Subject:
    """Pictures of one subject, their captions, the prompts to draw, and `texts`: these without the token, for CLIP."""

    name: str
    files: list
    captions: list
    prompts: list
    texts: list

    def checksum(self):
        """A number that changes if any picture, caption or prompt changes."""
        words = repr((self.captions, self.prompts, self.texts)).encode()
        return zlib.crc32(b"".join([words, *(file.read_bytes() for file in self.files)]))


def sentence(template, token, kind):
    """DreamBooth's template with {0} and {1} filled in; an empty token leaves no gap, and "a owl" becomes "an owl"."""
    words = " ".join(template.replace("{0}", token).replace("{1}", kind).split())
    return re.sub(r"\ba (?=[aeiou])", "an ", words)


def read_prompts(path):
    """DreamBooth's prompts_and_classes.txt: {subject: class}, templates for objects, templates for live subjects."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path} is missing or not UTF-8 text; put DreamBooth's classes and prompts there") from None
    classes = dict(re.findall(r"^([\w-]+),([\w -]+?)\s*$", text.partition("Prompts")[0], re.MULTILINE))
    classes.pop("subject_name", None)
    lists = re.findall(r"(Object|Live Subject) Prompts\s+prompt_list = \[(.*?)\]", text, re.DOTALL)
    templates = {name: re.findall(r"""(["'])(.*?)\1\.format\(""", body) for name, body in lists}
    templates = {name: [words for _, words in found] for name, found in templates.items()}
    if not classes or not templates.get("Object"):
        raise UserError(f"{path} lists no classes or no prompts; use the format of DreamBooth's file")
    return classes, templates["Object"], templates.get("Live Subject") or templates["Object"]


def read_subjects(folder):
    """The Subjects in `folder`, sorted by name. Pictures without captions get "a sks <class>". UserError if none."""
    classes, objects, live = read_prompts(folder / PROMPTS)
    subjects = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if path.name not in classes:
            raise UserError(f"{folder / PROMPTS} names no class for {path.name}; add a line {path.name},<class>")
        kind, files = classes[path.name], find_pictures([path])
        own = any(file.with_suffix(".txt").exists() for file in files) or (path / "metadata.jsonl").exists()
        token = "" if own else TOKEN
        captions = find_captions(files, None if own else sentence("a {0} {1}", token, kind))
        templates = live if kind in LIVE else objects
        prompts, texts = ([sentence(t, word, kind) for t in templates] for word in (token, ""))
        subjects.append(Subject(path.name, files, captions, prompts, texts))
    if not subjects:
        raise UserError(f"{folder} holds no folders of pictures; make one for each subject")
    return subjects
