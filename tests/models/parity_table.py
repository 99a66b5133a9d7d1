"""Largest differences from transformers' reference outputs, as a Markdown table.

    python tests/models/parity_table.py DIR [NAME ...]

DIR holds one directory a checkpoint, each with `oracle.npz` ({left,right}_{input_ids,attention_mask,logits}, gen_*), and
perhaps `reward/`, `value/` with theirs.
"""

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref

from rlhf_jax import scoring
from rlhf_jax.models import load_checkpoint, make_model


def row(directory: Path) -> list[str]:
    found = load_checkpoint(directory)
    model, oracle = make_model(found.spec), np.load(directory / "oracle.npz")
    logits = jax.jit(lambda p, ids, mask: model.logits(p, model.hidden(p, ids, mask)))
    errors = []
    for side in ("left", "right"):
        ids, mask = oracle[f"{side}_input_ids"], oracle[f"{side}_attention_mask"].astype(bool)
        errors.append(np.abs(np.asarray(logits(found.params, ids, mask)) - oracle[f"{side}_logits"])[mask].max())
    if "long_logits" in oracle:
        ids = oracle["long_input_ids"]
        errors.append(np.abs(np.asarray(logits(found.params, ids, np.ones_like(ids, bool))) - oracle["long_logits"]).max())
    expected = oracle["gen_ids_no_cache" if any(x.rope and x.rope.dynamic for x in found.spec.layers) else "gen_ids"]
    ids, mask = oracle["gen_input_ids"], oracle["gen_attention_mask"].astype(bool)
    order = np.argsort(~mask, axis=1, kind="stable")
    equal = []
    for prompts in ((ids, mask), (np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1))):
        out = jax.jit(lambda p, ids, mask: ref.greedy(model, p, ids, mask, expected.shape[1]), compiler_options=ref.FAST)
        equal.append(np.array_equal(out(found.params, *prompts), expected))
    cells = [f"{max(errors):.1e}", f"{sum(equal)} of 2"]
    for folder, head, name in (("reward", "score", "score"), ("value", "value", "values")):
        cells.append(f"{scalar_error(directory / folder, head, name):.1e}" if (directory / folder).is_dir() else "")
    return [directory.name, *cells]


def scalar_error(directory: Path, head: str, name: str) -> float:
    found = load_checkpoint(directory, head=head)
    model, oracle, errors = make_model(found.spec), np.load(directory / "oracle.npz"), []
    for side in ("left", "right"):
        ids, mask = oracle[f"{side}_input_ids"], oracle[f"{side}_attention_mask"].astype(bool)
        scores = np.asarray(jax.jit(lambda p, ids, mask: model.score(p, model.hidden(p, ids, mask)))(found.params, ids, mask))
        if name == "values":
            errors.append(np.abs(scores - oracle[f"{side}_values"])[mask].max())
        else:
            ends = scoring.readable(ids, mask, found.calibration.pad_id)
            errors.append(np.abs(np.asarray(scoring.at_last_token(scores, ends)) - oracle[f"{side}_score"]).max())
    return max(errors)


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    sys.stdout.write("| checkpoint | logits | greedy tokens | reward | value |\n|---|---|---|---|---|\n")
    for directory in sorted(path.parent for path in root.glob("*/oracle.npz")):
        if not names or directory.name in names:
            sys.stdout.write(f"| {' | '.join(row(directory))} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
