"""Packing changes where conversations stand, and nothing that is learnt: fine-tuning as a run does it, packed and not."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import variants

from rlhf_jax import config, metrics, models, offline, setups
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.types import Sequences

GSM8K = Path(__file__).parent / "data/gsm8k_rows.jsonl"  # 16 rows, Cobbe et al. 2021; the MIT licence stands beside them
ROWS, LENGTH = 8, 216  # of the packed batch, which holds all conversations
# Windows, learned positions, ALiBi.
CHANGES = {"mistral": {"sliding_window": 24}, "gpt2": {"n_positions": LENGTH}, "bloom": {}}
OPTIMIZER = config.Optimizer(learning_rate=3e-3, schedule="constant", eps=1e-2)
ROUNDING = 1e-6  # float32 sums in another order: of a loss, of the largest entry of a gradient (found: up to 3e-7)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """conversations.jsonl, and by family a model with random weights and a tokenizer of these texts."""
    folder = tmp_path_factory.mktemp("packing")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    turns = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    talks = [turn + (turns[n - 1] if n % 4 == 0 else []) for n, turn in enumerate(turns)]  # every fourth has two turns
    (folder / "conversations.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    tokenizer = train_bpe([row["question"] + row["answer"] for row in rows], 512)
    for name, changes in CHANGES.items():
        kind, described = variants.VARIANTS[name]
        described = described | changes | {"model_type": kind, "vocab_size": tokenizer.vocab_size}
        if "max_position_embeddings" in described:
            described["max_position_embeddings"] = LENGTH
        spec = models.spec_of(described)
        params = jax.jit(lambda key, spec=spec: models.make_model(spec).init(key, head="lm"))(jax.random.key(0))
        models.save_checkpoint(folder / name, spec, params, head="lm", tokenizer=tokenizer)
    return folder


def the_run(start: Path, family: str, out: Path, *, packing: bool) -> config.SFTRun:
    """Every batch holds every conversation once: packed in 8 rows, or in 16."""
    return config.SFTRun(
        out=str(out / ("packed" if packing else "plain")),
        steps=4,
        batch_size=ROWS if packing else 2 * ROWS,
        model=config.Model(path=str(start / family)),
        data=config.Data(path=str(start / "conversations.jsonl"), max_tokens=LENGTH, packing=packing, eval_fraction=0.0),
        optimizer=OPTIMIZER,
        log=config.Log(eval_every=0),
    )


def documents(batch: Sequences) -> list[tuple[Any, ...]]:
    """Tokens of every conversation of a batch and which of them are trained, sorted."""
    numbers = np.asarray(batch.mask, np.int32) if batch.segments is None else np.asarray(batch.segments)
    found = []
    for row, own in enumerate(numbers):
        for number in range(1, own.max() + 1):
            here = own == number
            found.append((*np.asarray(batch.tokens)[row, here].tolist(), *np.asarray(batch.target_mask)[row, here].tolist()))
    return sorted(found)


def apart(a: Any, b: Any) -> float:
    """Largest difference of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


@pytest.mark.parametrize(("family", "devices"), [("mistral", "all"), ("gpt2", "one"), ("bloom", "one")])
def test_a_packed_step_has_the_loss_gradient_and_result_of_the_plain_one(
    start: Path, family: str, devices: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if devices == "one":
        request.getfixturevalue("one_device")
    found, harmed = {}, {}
    for packing in (True, False):
        setup = setups.set_up_offline(setups.plan_offline("sft", the_run(start, family, tmp_path, packing=packing)))
        batch = setup.plan.data.batch(0)
        first = setup.initial_state()
        before = jax.device_get(first.trained.params)
        state, told = setup.update(jax.tree.map(jnp.copy, first), setup.place(batch), setup.frozen)
        moments = optax.tree_utils.tree_get(state.trained.opt_state, "mu")
        found[packing] = (batch, float(told["sft/loss_nats"]), *jax.device_get((moments, state.trained.params)))
        if packing:
            whole, on = np.asarray(batch.mask, np.int32), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), batch.tokens.shape)
            for name, each in {"segments": batch.replace(segments=whole), "positions": batch.replace(positions=on)}.items():
                harmed[name] = float(
                    setup.update(jax.tree.map(jnp.copy, first), setup.place(each), setup.frozen)[1]["sft/loss_nats"]
                )
    (packed, loss, moments, final), (plain, their_loss, their_moments, their_final) = found[True], found[False]
    assert packed.tokens.shape == (ROWS, LENGTH)
    assert packed.segments.max() > 1
    assert packed.mask.mean() > 1.5 * plain.mask.mean()
    assert documents(packed) == documents(plain)
    assert int(packed.positions.max()) < plain.tokens.shape[1] < LENGTH
    assert loss == pytest.approx(their_loss, rel=ROUNDING)
    largest = apart(their_moments, jax.tree.map(np.zeros_like, their_moments))
    assert apart(moments, their_moments) < ROUNDING * largest  # the first moment after one step is a tenth of the gradient
    assert apart(final, their_final) < 2.4e-7 < 1e-3 < apart(final, before)  # two steps of float32 at 1
    assert abs(harmed["segments"] - loss) > 100 * ROUNDING * loss, "attention across conversations would be seen"
    if family == "gpt2":
        assert abs(harmed["positions"] - loss) > 100 * ROUNDING * loss, "positions that go on would be seen"


@pytest.mark.usefixtures("one_device")
def test_a_packed_run_learns_what_the_plain_one_does(start: Path, tmp_path: Path) -> None:
    losses, finals = [], []
    for packing in (True, False):
        out = offline.run("sft", the_run(start, "mistral", tmp_path, packing=packing))
        rows = [row for row in metrics.read_rows(out / metrics.METRICS) if "sft/loss_nats" in row]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        losses.append([row["sft/loss_nats"] for row in rows])
        finals.append(models.load_checkpoint(out / "final", head="lm").params)
        assert (rows[0]["data/padded_fraction"] < 0.3) == packing
    before = jax.device_get(models.load_checkpoint(start / "mistral", head="lm").params)
    np.testing.assert_allclose(losses[0], losses[1], rtol=ROUNDING)
    assert losses[1][-1] < losses[1][0] - 0.05
    assert apart(*finals) < 1e-6 < 1e-3 < apart(finals[0], before)
