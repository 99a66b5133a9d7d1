"""Known answers for the numeric core: `ref` are float64 definitions written from the papers, never from this code.

tests/oracles/<name>.npz holds, per case: `<case>/meta` (JSON), `<case>/in/<name>`, `<case>/ref/<output>` and, where parity with
the classical trainer is claimed, `<case>/f32/dschat.<function>/<output>`, computed by that trainer's own code.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    name: str
    meta: dict[str, Any]
    inputs: dict[str, np.ndarray]
    ref: dict[str, np.ndarray]  # float64
    peers: dict[str, dict[str, np.ndarray]]  # "dschat.compute_rewards" -> outputs, float32


@functools.cache
def load(name: str) -> dict[str, Case]:
    """All cases of one file, in its order."""
    with np.load(Path(__file__).parent / "oracles" / f"{name}.npz") as archive:
        found = {str(case): Case(str(case), json.loads(str(archive[f"{case}/meta"])), {}, {}, {}) for case in archive["cases"]}
        for key in archive.files:
            case, *path = key.split("/")
            if len(path) == 2:
                (found[case].inputs if path[0] == "in" else found[case].ref)[path[1]] = archive[key]
            elif len(path) == 3 and path[0] == "f32":
                found[case].peers.setdefault(path[1], {})[path[2]] = archive[key]
    for case in found.values():
        case.inputs.update(found[case.meta.get("same_inputs_as", case.name)].inputs)
    return found


def names(name: str) -> list[str]:
    """Case names, for `pytest.mark.parametrize`."""
    return list(load(name))


def close(got: Any, want: Any, *, rtol: float = 2e-6, atol: float | None = None, where: Any = None, what: str = "") -> None:
    """Compare with a float64 reference: relative to the largest kept value unless `atol` is given."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if where is not None:
        keep = np.asarray(where, bool)
        got, want = got[keep], want[keep]
    if want.size:
        scale = float(np.max(np.abs(want), initial=0.0, where=np.isfinite(want)))
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * scale if atol is None else atol, err_msg=what)
