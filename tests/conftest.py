import pytest
from tiny_pipeline import write_pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a complete pipeline with random weights, for pictures of 16×16."""
    return write_pipeline(tmp_path_factory.mktemp("weights") / "tiny")
