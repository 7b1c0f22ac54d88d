"""The golden tests take other fixtures than those of tests/golden (SSL_DIST_GOLDEN): other rounding, fewer steps."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "golden"


def golden_tests(name, folder, monkeypatch):
    """The module tests/test_golden_<name>.py, on the fixtures of a folder."""
    monkeypatch.setenv("SSL_DIST_GOLDEN", str(folder))
    path = Path(__file__).with_name(f"test_golden_{name}.py")
    spec = importlib.util.spec_from_file_location(f"other_golden_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, name, change):
    """The fixture with every (key, array) as `change` returns it; None leaves it out."""
    changed = {key: change(key, array) for key, array in np.load(FOLDER / f"{name}.npz").items()}
    np.savez(folder / f"{name}.npz", **{key: array for key, array in changed.items() if array is not None})


@pytest.mark.parametrize(("column", "by", "passes"), [(1, 3e-8, True), (1, 1e-5, False), (0, 3e-8, False)])
def test_accuracies_are_compared_as_sums_in_float32(column, by, passes, tmp_path, monkeypatch):
    def change(key, array):
        if key.endswith("loss_acc"):
            array = array.copy()
            array[..., column] *= 1 + by
        return array

    write(tmp_path, "eval", change)
    module = golden_tests("probe", tmp_path, monkeypatch)
    for test in (lambda: module.test_linear_evaluation("f64"), lambda: module.test_fine_tuning(module.CASES[0], "f64")):
        if passes:
            test()
        else:
            with pytest.raises(AssertionError, match="loss_acc"):
                test()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_relics_loops_may_have_fewer_steps(num_steps, tmp_path, monkeypatch):
    def change(key, array):
        step = re.match(r"loop/\w+/step(\d+)/", key)
        return None if step and int(step[1]) >= num_steps else array

    write(tmp_path, "relic", change)
    module = golden_tests("relic", tmp_path, monkeypatch)
    for case in module.LOOPS:
        with monkeypatch.context() as patched:
            module.test_training_loop(case, patched)
