"""Output files, alike in every command: checked before the work, never replaced unasked, and whole or not at all."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from moe_serve.cli import main
from moe_serve.cli.flags import default_model
from moe_serve_base.whole_files import OutputError, whole_file, write_text
from predictors.trace import RoutingTrace

L, E, K = 4, 8, 2
PLAN = ["plan", "{in}/trace.npz", "--gpus", "2", "--effort", "1", "--time-limit", "1", "--solver", "chain", "--quiet"]
COMMANDS = {
    "plan": [*PLAN, "--output"],
    "plan html": [*PLAN, "--html"],
    "plan png": [*PLAN, "--png"],
    "plan eplb": [*PLAN, "--eplb"],
    "plan sglang": [*PLAN, "--model-layers", "4000", "--sglang"],
    "plan migrate": ["plan", "migrate", "{in}/even.json", "{in}/odd.json", "--steps"],
    "replay json": ["replay", "{in}/trace.npz", "--policies", "lru", "--json"],
    "replay plot": ["replay", "{in}/trace.npz", "--policies", "lru", "--plot"],
    "predictor train": ["predictor", "train", "{in}/trace.npz", "--method", "frequency", "--output"],
    "predictor evaluate": ["predictor", "evaluate", "{in}/trace.npz", "--method", "frequency", "--json"],
    "trace": ["trace", "--prompts", "{in}/prompts.txt", "--max-tokens", "200", "--ignore-eos", "-o"],
    "pack": ["pack", default_model()],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace, two plans and prompts."""
    folder = tmp_path_factory.mktemp("in")
    rng = np.random.default_rng(0)
    ids = np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(400)])
    RoutingTrace(ids, np.arange(0, 401, 20), np.arange(L, dtype=np.int32), E).save(folder / "trace.npz")
    (folder / "prompts.txt").write_text("One\nTwo\n")
    for name, solver in (("even", "contiguous"), ("odd", "round_robin")):
        words = [*PLAN[:2], "--gpus", "2", "--solver", solver, "--quiet", "--output", str(folder / f"{name}.json")]
        assert main([word.format_map({"in": folder}) for word in words]) == 0
    return folder


def call(command: str, inputs: Path, output: Path, *more: str) -> int:
    words = [word.format_map({"in": inputs}) for word in COMMANDS[command]]
    return main([*words, str(output), *more])


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """What the system does on a full disk: a write beyond the limit fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_told_before_the_work(
    command: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").write_text("precious")
    mistakes = {
        tmp_path / "no" / "out": f"its folder does not exist; create {tmp_path / 'no'} first",
        tmp_path / "old": "exists; choose another name, or replace it with --force",
        tmp_path: "exists and is a folder; choose another name",
    }
    capsys.readouterr()
    for output, message in mistakes.items():
        assert call(command, inputs, output) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{output} " in line
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "precious"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_is_one_line_and_leaves_the_old_file(
    command: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.write_text("precious")
    capsys.readouterr()
    with files_of_at_most(64):
        assert call(command, inputs, old, "--force") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-serve: "))
    assert line == f"moe-serve: error: {old}: cannot be written (File too large)"
    assert old.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line(command: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(command, inputs, Path("/dev/full")) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-serve: "))
    assert line.startswith("moe-serve: error: ")
    assert "/dev/full" in line
    assert "No space left on device" in line


@pytest.mark.parametrize("command", ["plan", "predictor train", "replay json"])
def test_force_replaces(command: str, inputs: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("precious")
    assert call(command, inputs, old, "--force") == 0
    assert b"precious" not in old.read_bytes()
    assert list(tmp_path.iterdir()) == [old]


def test_a_quantised_folder_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files_of_at_most(100_000):
        assert main(["quantize", default_model(), "-o", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path / 'out'}: cannot be written (" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["quantize", default_model(), "-o", str(tmp_path / "no" / "out")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    write_text(Path(os.devnull), "lost")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(OutputError, match="/dev/full: cannot be written"):
        write_text(Path("/dev/full"), "too much")


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "text"


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_file(tmp_path / "new") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
