"""Predictor files: what comes back, and which are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from predictors.files import PredictorFileError, load, save
from predictors.methods.frequency import Frequency
from predictors.predictor import RouterShape, Training
from predictors.trace import RoutingTrace


@pytest.fixture
def path(small_trace: RoutingTrace, tmp_path: Path) -> Path:
    training = Training(small_trace)
    save(tmp_path / "f.safetensors", "frequency", Frequency.fit(training), training.shape, "abc")
    return tmp_path / "f.safetensors"


def test_a_file_is_the_predictor(path: Path, small_trace: RoutingTrace) -> None:
    for fingerprint in ("abc", None):
        file = load(path, RouterShape(tuple(range(2)), 4, 2), fingerprint)
        assert (file.method, file.fingerprint) == ("frequency", "abc")
        popularity = file.predictor.arrays()["popularity"]
        np.testing.assert_allclose(popularity, small_trace.popularity(), rtol=1e-6)


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(PredictorFileError, match="another checkpoint"):
        load(path, fingerprint="xyz")
    with pytest.raises(PredictorFileError, match="2 layers of 4 experts, top-2, but this model has 3 layers"):
        load(path, RouterShape(tuple(range(3)), 4, 2))


def test_what_is_no_predictor_is_said_to_be_none(path: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictorFileError, match="does not exist"):
        load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(PredictorFileError, match="no safetensors file"):
        load(tmp_path / "text.safetensors")
    save_file({"a": np.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(PredictorFileError, match="no predictor"):
        load(tmp_path / "weights.safetensors")


def test_a_method_without_its_arrays_is_damaged(path: Path, tmp_path: Path) -> None:
    class Empty(Frequency):
        def arrays(self) -> dict[str, np.ndarray]:
            return {}

    save(
        tmp_path / "d.safetensors",
        "frequency",
        Empty(RouterShape(tuple(range(2)), 4, 2), np.zeros((2, 4))),
        RouterShape(tuple(range(2)), 4, 2),
        None,
    )
    with pytest.raises(PredictorFileError, match="damaged"):
        load(tmp_path / "d.safetensors")
