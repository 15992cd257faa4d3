import sys

import pytest
from tiny_pipeline import write_pipeline

from dit.pipeline import Pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a complete pipeline with random weights, for pictures of 16×16."""
    return write_pipeline(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def loaded(monkeypatch):
    """A list that gets the names of the loaded parts at the end of each `Pipeline.encode_prompt`."""
    parts, encode = [], Pipeline.encode_prompt

    def watched(pipe, prompts):
        embeddings = encode(pipe, prompts)
        parts.append({"transformer", "vae", "text_encoder"} & vars(pipe).keys())
        return embeddings

    monkeypatch.setattr(Pipeline, "encode_prompt", watched)
    return parts


@pytest.fixture
def mistake(capsys, monkeypatch):
    """mistake(command, *arguments): the one line that a command, a module, says about a mistake, as a user sees it."""

    def line(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command.run(command.main)
        printed = capsys.readouterr()
        assert exit.value.code == 2
        # A mistake that shows late may come after the one line that says which pictures are used.
        assert not printed.out or (" picture" in printed.out and printed.out.count("\n") == 1)
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err

    return line
