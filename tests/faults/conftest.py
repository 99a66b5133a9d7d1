"""The command line in this process: every fault must end in a status and a few lines, never in a traceback."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_jax import cli
from tests.faults import stages

LINES = 15


@pytest.fixture
def command(monkeypatch, capfd, one_device):
    """command("sft", file, "steps=2") -> (status, everything printed). At most 15 lines of message, no traceback."""

    def call(*arguments):
        monkeypatch.setattr(os, "environ", dict(os.environ))
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as left:
            status = left.code or 0
        captured = capfd.readouterr()
        text = captured.out + captured.err
        assert "Traceback" not in text
        if status:
            message = captured.err[captured.err.find("rlhf-jax: ") :] if "rlhf-jax: " in captured.err else captured.err
            assert len(message.splitlines()) <= LINES, message
        return status, text

    return call


@pytest.fixture
def sft(tmp_path) -> Path:
    """A run file of a tiny fine-tuning run in `tmp_path / "sft"`."""
    return stages.write_configs(tmp_path)["sft"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, on_one_device) -> Path:
    """A fine-tuning run that nobody interrupted, with the checkpoints of all its steps. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    config = stages.write_configs(folder)["sft"]
    keys = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(keys | {"save": {"every": 1, "keep_every": 1}}))
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["rlhf-jax", "sft", str(config)])
    with on_one_device(), pytest.raises(SystemExit, match="^0$"):
        cli.main()
    patch.undo()
    return folder / "sft"
