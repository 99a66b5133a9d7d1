"""Batches: shapes, masks that decode to the answers, policies with counts, packing, splits, fingerprints."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.config import Data, Source
from rlhf_jax.data.batches import make_labelled_data, make_preference_data, make_prompt_data, make_sft_data
from rlhf_jax.data.table import describe, purpose_of
from rlhf_jax.data.tasks import TASKS
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from rlhf_jax.errors import UserError

TOKENIZERS = Path(__file__).parent / "tokenizers"
TEXT = "the cat sat on a mat and saw seven small dogs run past the old green door"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([" ".join(WORDS)] * 20, 320)


def _sentences(count: int, most: int = 12) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, most)))) for _ in range(count)]


def _sft_rows(count: int = 60) -> list[dict]:
    return [{"prompt": f"{text} {n}:", "completion": f" {text}!"} for n, text in enumerate(_sentences(count))]


def _pairs(count: int = 60) -> list[dict]:
    return [
        {"prompt": f"{text} {n}:", "chosen": f" good {text}", "rejected": f" bad {text}"}
        for n, text in enumerate(_sentences(count))
    ]


def _text(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> str:
    return tokenizer.decode(tokens[mask], skip_special=False)


DATA = Data(max_tokens=64, max_prompt_tokens=48)


def test_sft_masks_decode_to_the_answers(bpe: Tokenizer):
    rows = _sft_rows()
    data = make_sft_data(DATA, bpe, seed=0, batch_size=8, rows=rows)
    answers = {row["prompt"]: row["completion"] for row in rows}
    seen = set()
    for step in range(12):
        batch = data.batch(step)
        assert batch.tokens.shape == batch.mask.shape == batch.target_mask.shape == (8, data.length)
        assert (batch.tokens.dtype, batch.mask.dtype, batch.target_mask.dtype) == (np.int32, np.bool_, np.bool_)
        assert batch.segments is None
        for tokens, mask, trained in zip(batch.tokens, batch.mask, batch.target_mask, strict=True):
            prompt = _text(bpe, tokens, mask & ~trained).removeprefix("<bos>")
            assert _text(bpe, tokens, trained) == answers[prompt] + "<eos>"
            assert not (trained & ~mask).any()
            assert not trained[0]
            assert (np.diff(mask.astype(int)) <= 0).all()  # right-padded
            assert (tokens[~mask] == bpe.pad_id).all()
            seen.add(prompt)
    assert len(seen) == len(data.tables.tables[0].train)


def test_conversations_train_the_assistant_only():
    tokenizer = load_tokenizer(TOKENIZERS / "llama3")
    messages = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    rows = [{"messages": [{"role": role, "content": f"{text}{n}"} for role, text in messages]} for n in range(4)]
    batch = make_sft_data(dataclasses.replace(DATA, eval_fraction=0.0), tokenizer, seed=0, batch_size=4, rows=rows).batch(0)
    found = {_text(tokenizer, tokens, trained) for tokens, trained in zip(batch.tokens, batch.target_mask, strict=True)}
    assert found == {f"one{n}<|im_end|>two{n}<|im_end|>" for n in range(4)}
    split = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in rows]
    batch = make_sft_data(dataclasses.replace(DATA, eval_fraction=0.0), tokenizer, seed=0, batch_size=4, rows=split).batch(0)
    found = {_text(tokenizer, tokens, trained) for tokens, trained in zip(batch.tokens, batch.target_mask, strict=True)}
    assert found == {f"two{n}<|im_end|>" for n in range(4)}


def test_training_sees_the_prompt_that_sampling_sees(bpe: Tokenizer):
    rows = _pairs()
    pairs = make_preference_data(DATA, bpe, seed=0, batch_size=8, rows=rows)
    prompts = make_prompt_data(DATA, bpe, seed=0, batch_size=8, rows=rows)
    a, b = pairs.batch(0), prompts.batch(0)
    for i in range(8):
        prompt = b.tokens[i][b.mask[i]]
        for side in (a.chosen, a.rejected):
            assert (side.tokens[i][: len(prompt)] == prompt).all()
            assert not side.target_mask[i][: len(prompt)].any()
            assert side.target_mask[i][len(prompt)]


def test_preferences_decode_to_both_answers(bpe: Tokenizer):
    data = make_preference_data(DATA, bpe, seed=1, batch_size=16, rows=_pairs())
    batch = data.batch(2)
    assert batch.margin is None
    for i in range(16):
        good = _text(bpe, batch.chosen.tokens[i], batch.chosen.target_mask[i])
        bad = _text(bpe, batch.rejected.tokens[i], batch.rejected.target_mask[i])
        assert good.startswith(" good")
        assert bad == good.replace(" good", " bad", 1)
        assert good.endswith("<eos>")


def test_margins_and_unfinished_answers(bpe: Tokenizer):
    rows = [row | {"margin": n / 4, "rejected_finished": False} for n, row in enumerate(_pairs(20))]
    data = make_preference_data(dataclasses.replace(DATA, eval_fraction=0.0), bpe, seed=0, batch_size=20, rows=rows)
    batch = data.batch(0)
    assert sorted(batch.margin.tolist()) == [n / 4 for n in range(20)]
    assert all(bpe.eos_id in row for row in batch.chosen.tokens)
    assert not any(bpe.eos_id in row for row in batch.rejected.tokens)


def test_rows_without_a_margin_count_0_wherever_they_stand(bpe: Tokenizer):
    rows = [row | ({"margin": 3.0} if n % 2 else {"margin": None} if n else {}) for n, row in enumerate(_pairs(20))]
    data = make_preference_data(dataclasses.replace(DATA, eval_fraction=0.0), bpe, seed=0, batch_size=20, rows=rows)
    assert sorted(data.batch(0).margin.tolist()) == [0.0] * 10 + [3.0] * 10
    assert describe(data.tables.counts()) == "20 rows, 20 kept, 10 with a margin"


def test_prompts_are_left_padded_and_find_their_columns(bpe: Tokenizer):
    rows = [{"prompt": f"{text} {n}", "answer": n} for n, text in enumerate(_sentences(50))]
    data = make_prompt_data(DATA, bpe, seed=0, batch_size=8, rows=rows)
    batch = data.batch(3)
    assert batch.tokens.shape == (8, data.length)
    assert (np.diff(batch.mask.astype(int), axis=1) >= 0).all()
    assert batch.mask[:, -1].all()
    assert batch.index.dtype == np.int32
    texts, answers = data.texts(batch.index), data.columns(batch.index)["answer"]
    for i in range(8):
        assert bpe.decode(batch.tokens[i][batch.mask[i]]) == texts[i] == rows[answers[i]]["prompt"]
    again = data.prompts(batch.index)
    assert (again.tokens == batch.tokens).all()


def test_chat_prompts_are_rendered():
    tokenizer = load_tokenizer(TOKENIZERS / "gpt2")
    rows = [{"prompt": [{"role": "user", "content": f"q{n}"}]} for n in range(8)]
    data = make_prompt_data(dataclasses.replace(DATA, eval_fraction=0.0), tokenizer, seed=0, batch_size=8, rows=rows)
    batch = data.batch(0)
    for i, text in enumerate(data.texts(batch.index)):
        assert _text(tokenizer, batch.tokens[i], batch.mask[i]) == text
        assert text.endswith("<|im_start|>assistant\n")


def test_a_batch_depends_on_seed_and_step_alone(bpe: Tokenizer):
    one, other = (make_sft_data(DATA, bpe, seed=5, batch_size=8, rows=_sft_rows()) for _ in range(2))
    other.batch(0)
    assert (one.batch(11).tokens == other.batch(11).tokens).all()
    different = make_sft_data(DATA, bpe, seed=6, batch_size=8, rows=_sft_rows())
    assert not (one.batch(11).tokens == different.batch(11).tokens).all()


def test_without_the_cache_rows_are_read_again_and_nothing_changes(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in _pairs()))
    cached = make_preference_data(dataclasses.replace(DATA, path=str(path)), bpe, seed=0, batch_size=8)
    monkeypatch.setattr("rlhf_jax.data.table.CACHE_TOKENS", 100)
    read = make_preference_data(dataclasses.replace(DATA, path=str(path)), bpe, seed=0, batch_size=8)
    assert cached.tables.tables[0].cache is not None
    assert read.tables.tables[0].cache is None
    # A line number is found by reading the file from its beginning: seconds a batch in a large file, for a message nobody sees.
    object.__setattr__(read.tables.tables[0].source, "where", lambda row: pytest.fail(f"looked up the line of row {row}"))
    for name in ("tokens", "mask", "target_mask"):
        assert (getattr(cached.batch(3).rejected, name) == getattr(read.batch(3).rejected, name)).all()


def test_long_prompts_follow_the_policy(bpe: Tokenizer):
    rows = [{"prompt": " ".join(WORDS * (1 + 3 * (n % 2))) + f" {n}", "chosen": " yes", "rejected": " no"} for n in range(20)]
    data = dataclasses.replace(DATA, max_prompt_tokens=24, eval_fraction=0.0)
    dropped = make_prompt_data(data, bpe, seed=0, batch_size=4, rows=rows)
    assert dropped.tables.counts()["dropped: prompt longer than max_prompt_tokens = 24"] == 10
    cut = make_prompt_data(dataclasses.replace(data, long_prompts="truncate_left"), bpe, seed=0, batch_size=20, rows=rows)
    assert cut.tables.counts()["truncated: prompt cut on the left"] == 10
    batch = cut.batch(0)
    for i, text in enumerate(cut.texts(batch.index)):
        tokens = batch.tokens[i][batch.mask[i]]
        assert tokens[0] == bpe.bos_id
        assert text.endswith(bpe.decode(tokens))
        assert len(tokens) <= 24
    with pytest.raises(UserError, match=r"rows: row 1: the prompt has \d+ tokens, allowed are 24 \(data.max_prompt_tokens\)"):
        make_preference_data(
            dataclasses.replace(data, long_prompts="error", on_bad_rows="skip"), bpe, seed=0, batch_size=4, rows=rows
        )


def test_a_prompt_that_is_dropped_names_the_key_that_dropped_it(bpe: Tokenizer):
    rows = [{"prompt": f"the film {n}", "chosen": " yes", "rejected": " no"} for n in range(4)]
    for key, words in (("max_tokens", "max_tokens - 1 = 2"), ("max_prompt_tokens", "max_prompt_tokens = 3")):
        with pytest.raises(UserError, match=f"4 dropped: prompt longer than {words}, 0 kept"):
            make_preference_data(dataclasses.replace(DATA, **{key: 3}), bpe, seed=0, batch_size=2, rows=rows)


def test_long_answers_are_cut_and_lose_their_end(bpe: Tokenizer):
    rows = [{"prompt": f"{n}:", "completion": " ".join(WORDS * 8)} for n in range(8)]
    data = make_sft_data(dataclasses.replace(DATA, max_tokens=32, eval_fraction=0.0), bpe, seed=0, batch_size=8, rows=rows)
    assert data.tables.counts()["truncated: answer cut on the right (no end-of-sequence)"] == 8
    assert data.length == 32
    assert bpe.eos_id not in data.batch(0).tokens


def test_empty_and_equal_rows_are_dropped_and_counted(bpe: Tokenizer):
    good = _pairs(6)
    bad = [good[0] | {"chosen": "  "}, good[0] | {"rejected": good[0]["chosen"]}, good[0] | {"rejected": ""}]
    data = make_preference_data(dataclasses.replace(DATA, eval_fraction=0.0), bpe, seed=0, batch_size=6, rows=good + bad)
    counts = data.tables.counts()
    assert (counts["rows"], counts["kept"], counts["dropped: empty answer"], counts["dropped: chosen equals rejected"]) == (
        9,
        6,
        2,
        1,
    )
    rows = [{"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}]
    prompts = make_prompt_data(dataclasses.replace(DATA, eval_fraction=0.0), bpe, seed=0, batch_size=2, rows=rows)
    assert prompts.tables.counts()["dropped: empty prompt"] == 1


def test_pairs_that_differ_only_beyond_the_cut_are_dropped(bpe: Tokenizer):
    rows = [{"prompt": f"{n}", "chosen": " ".join(WORDS * 9) + " yes", "rejected": " ".join(WORDS * 9) + " no"} for n in range(4)]
    told = (
        "0 rows left for preferences: 4 rows, 4 dropped: chosen equals rejected after truncation, 0 kept; raise data.max_tokens"
    )
    with pytest.raises(UserError, match=told):
        make_preference_data(dataclasses.replace(DATA, max_tokens=32), bpe, seed=0, batch_size=2, rows=rows)


def test_bad_rows_stop_or_are_counted(bpe: Tokenizer, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in _pairs(10)]
    lines[3] = '{"prompt": "x", "chosen": null, "rejected": "y"}'
    lines[6] = '{"prompt": '
    path.write_text("\n".join(lines))
    data = dataclasses.replace(DATA, path=str(path), eval_fraction=0.0)
    with pytest.raises(UserError, match=r"a\.jsonl:4: column chosen must be"):
        make_preference_data(data, bpe, seed=0, batch_size=2)
    skipped = make_preference_data(dataclasses.replace(data, on_bad_rows="skip"), bpe, seed=0, batch_size=8)
    assert skipped.tables.counts()["skipped: row that cannot be used"] == 2
    lines[3] = lines[0]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:7:12: not JSON"):
        make_preference_data(data, bpe, seed=0, batch_size=2)


def test_the_format_is_found_in_the_first_row_that_can_be_read(bpe: Tokenizer):
    rows = [{"other": 1}, *_sft_rows(8)]
    data = make_sft_data(dataclasses.replace(DATA, on_bad_rows="skip"), bpe, seed=0, batch_size=2, rows=rows)
    assert data.tables.tables[0].form == "completion"


@pytest.mark.parametrize("packing", [False, True])
def test_fewer_rows_than_a_batch(bpe: Tokenizer, packing: bool):
    with pytest.raises(UserError, match=r"fewer than batch_size = 64 .*set batch_size to at most"):
        make_sft_data(dataclasses.replace(DATA, packing=packing), bpe, seed=0, batch_size=64, rows=_sft_rows(20))


def test_packed_rows_hold_whole_conversations(bpe: Tokenizer):
    rows = _sft_rows(120)
    packed = make_sft_data(dataclasses.replace(DATA, packing=True, max_tokens=128), bpe, seed=0, batch_size=4, rows=rows)
    plain = make_sft_data(dataclasses.replace(DATA, max_tokens=128), bpe, seed=0, batch_size=4, rows=rows)
    assert packed.padded_fraction < 0.1 < plain.padded_fraction
    answers = {row["prompt"]: row["completion"] for row in rows}
    seen = []
    for step in range(len(packed.packs[0]) // 4):
        batch = packed.batch(step)
        assert (batch.mask == (batch.segments > 0)).all()
        for i in range(4):
            for segment in range(1, int(batch.segments[i].max()) + 1):
                here = batch.segments[i] == segment
                assert (batch.positions[i][here] == np.arange(here.sum())).all()
                assert not batch.target_mask[i][here][0]
                prompt = _text(bpe, batch.tokens[i], here & ~batch.target_mask[i]).removeprefix("<bos>")
                assert _text(bpe, batch.tokens[i], here & batch.target_mask[i]) == answers[prompt] + "<eos>"
                seen.append(prompt)
    assert len(set(seen)) == len(seen)
    evaluation, _ = next(packed.eval_batches())
    assert evaluation.segments.max() == 1


def test_evaluation_covers_every_held_out_row_once(bpe: Tokenizer):
    data = make_preference_data(dataclasses.replace(DATA, eval_fraction=0.3), bpe, seed=0, batch_size=8, rows=_pairs(60))
    held_out = len(data.tables.eval_index())
    assert 8 < held_out < 30
    found = []
    for batch, valid in data.eval_batches():
        assert batch.chosen.tokens.shape[0] == 8
        assert not batch.chosen.mask[~valid].any()
        found += [_text(bpe, t, m) for t, m in zip(batch.chosen.tokens[valid], batch.chosen.mask[valid], strict=True)]
    trained = [
        _text(bpe, t, m) for s in range(9) for t, m in zip(data.batch(s).chosen.tokens, data.batch(s).chosen.mask, strict=True)
    ]
    assert len(set(found)) == len(found) == held_out
    assert not set(found) & set(trained)


def test_an_evaluation_may_take_some_of_the_held_out_rows_the_same_each_time_from_all_over_the_file(bpe: Tokenizer):
    data = make_preference_data(dataclasses.replace(DATA, eval_fraction=0.3), bpe, seed=0, batch_size=4, rows=_pairs(60))
    every = data.tables.eval_index()
    assert len(every) > 13

    def chosen(most: int | None) -> list[int]:
        parts = list(data.tables.eval_batches(most))
        assert {len(part) for part in parts} == {4}
        return [i for part in parts for i in part.tolist() if i >= 0]

    places = [every.tolist().index(i) for i in chosen(6)]
    assert len(places) == 6
    assert chosen(6) == chosen(6)
    gaps = np.diff([*places, len(every)])
    assert max(gaps) - min(gaps) <= 1, "evenly spaced, however the file is sorted"
    assert chosen(None) == chosen(len(every)) == chosen(1000) == every.tolist()
    assert [valid.sum() for _, valid in data.eval_batches(6)] == [4, 2]


def test_the_split_follows_the_prompt_not_the_seed_the_order_or_the_stage(bpe: Tokenizer):
    rows = _pairs(60)
    data = dataclasses.replace(DATA, eval_fraction=0.3)

    def held(rows: list[dict], seed: int) -> set[str]:
        prompts = make_prompt_data(data, bpe, seed=seed, batch_size=4, rows=rows)
        return set(prompts.texts(prompts.tables.eval_index()))

    first = held(rows, 0)
    assert first == held(rows[::-1], 1) == held(rows + rows, 2)
    assert held(rows[:40], 0) == {row["prompt"] for row in rows[:40]} & first
    sft = make_sft_data(data, bpe, seed=0, batch_size=4, rows=rows)
    table = sft.tables.tables[0]
    assert {table.row(i).prompt for i in table.eval} == first


def test_few_prompts_are_split_by_row_and_both_sides_exist():
    tokenizer = TASKS["reviews"].tokenizer()
    data = make_sft_data(dataclasses.replace(DATA, task="reviews"), tokenizer, seed=0, batch_size=8)
    assert 450 < len(data.tables.eval_index()) < 750
    rows = [{"prompt": "the hotel :", "completion": "it was nice ."}, {"prompt": "the cafe :", "completion": "it was bad ."}]
    tiny = make_sft_data(dataclasses.replace(DATA, eval_fraction=0.01), tokenizer, seed=0, batch_size=1, rows=rows)
    assert len(tiny.tables.eval_index()) == 1
    none = make_sft_data(dataclasses.replace(DATA, eval_fraction=0.0), tokenizer, seed=0, batch_size=2, rows=rows)
    assert len(none.tables.eval_index()) == 0
    assert not list(none.eval_batches())


def test_fixed_evaluation_prompts(bpe: Tokenizer):
    data = make_prompt_data(DATA, bpe, seed=0, batch_size=4, rows=_pairs(40))
    first, again = data.eval_batch(32), data.eval_batch(32)
    assert (first.index == again.index).all()
    assert first.tokens.shape == (32, data.length)
    held = set(data.tables.eval_index().tolist())
    assert set(first.index[: len(held)].tolist()) == held
    assert data.eval_batch(100).index.shape == (100,)


def test_several_sources_with_weights(bpe: Tokenizer, tmp_path: Path):
    paths = []
    for name, count in (("a", 30), ("b", 200)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(json.dumps({"prompt": f"{name} {n}", "source": name}) for n in range(count)))
    sources = tuple(Source(path=str(path), weight=weight) for path, weight in zip(paths, (3.0, 1.0), strict=True))
    data = make_prompt_data(dataclasses.replace(DATA, sources=sources, eval_fraction=0.0), bpe, seed=0, batch_size=64)
    drawn = [name for step in range(64) for name in data.columns(data.batch(step).index)["source"]]
    assert drawn.count("a") == 3 * drawn.count("b") == 3072
    assert data.batch(0).index.max() < 230


@pytest.mark.parametrize("packing", [False, True])
def test_weights_are_shares_of_conversations_and_the_padding_told_is_theirs(bpe: Tokenizer, tmp_path: Path, packing: bool):
    paths = []
    for name, words in (("short", 1), ("long", 24)):
        rows = [{"prompt": f"{name}:", "completion": " ".join(WORDS[n % 5 :][:1] * words)} for n in range(160)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(json.dumps(row) for row in rows))

    sources = tuple(Source(path=str(path), weight=weight) for path, weight in zip(paths, (9.0, 1.0), strict=True))
    settings = dataclasses.replace(DATA, sources=sources, packing=packing, eval_fraction=0.0)
    data = make_sft_data(settings, bpe, seed=0, batch_size=16)
    batches = [data.batch(step) for step in range(256)]
    text = "".join(_text(bpe, batch.tokens, batch.mask) for batch in batches)
    assert text.count("short:") / text.count(":") == pytest.approx(0.9, abs=0.01)
    assert data.padded_fraction == pytest.approx(1 - np.mean([batch.mask for batch in batches]), abs=0.01)
    one = make_sft_data(dataclasses.replace(settings, sources=sources[:1]), bpe, seed=0, batch_size=16)
    assert one.tables.weights == (9.0,), "a run with one source goes on as before"
    as_given = dataclasses.replace(data, tables=dataclasses.replace(data.tables, weights=(9.0, 1.0)))
    assert (data.fingerprint() == as_given.fingerprint()) == (not packing), "a run whose rows came in another order is refused"


@pytest.mark.parametrize("keys", [{}, {"path": "x.jsonl", "task": "reviews"}])
def test_exactly_one_source_of_data(bpe: Tokenizer, keys: dict):
    with pytest.raises(UserError, match=r"exactly one of data.path, data.sources, data.task"):
        make_sft_data(Data(**keys), bpe, seed=0, batch_size=1)


def test_the_fingerprint_follows_data_and_tokenizer(bpe: Tokenizer):
    rows = _sft_rows()

    def mark(rows: list[dict], tokenizer: Tokenizer = bpe, **changes: object) -> str:
        return make_sft_data(dataclasses.replace(DATA, **changes), tokenizer, seed=0, batch_size=4, rows=rows).fingerprint()

    base = mark(rows)
    assert base == mark(_sft_rows())
    others = [mark(rows[:-1]), mark(rows, max_tokens=63), mark(rows, packing=True), mark(rows, eval_fraction=0.2)]
    others += [mark(rows, load_tokenizer(TOKENIZERS / "gpt2")), mark([rows[0] | {"completion": "?"}, *rows[1:]])]
    assert len({base, *others}) == 7


def test_a_limit_reads_the_first_rows(bpe: Tokenizer, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in _sft_rows()))
    data = dataclasses.replace(DATA, path=str(path), limit=10, eval_fraction=0.0)
    assert make_sft_data(data, bpe, seed=0, batch_size=10).tables.counts()["rows"] == 10
    with pytest.raises(UserError, match=r"data\.limit = 0"):
        make_sft_data(dataclasses.replace(data, limit=0), bpe, seed=0, batch_size=1)


def test_shapes_shrink_to_what_the_data_needs(bpe: Tokenizer):
    data = make_sft_data(dataclasses.replace(DATA, max_tokens=4096), bpe, seed=0, batch_size=4, rows=_sft_rows())
    assert data.length % 8 == 0
    assert data.length < 200
    with pytest.raises(UserError, match=r"data.max_tokens = 1"):
        make_sft_data(dataclasses.replace(DATA, max_tokens=1), bpe, seed=0, batch_size=4, rows=_sft_rows())


def test_labelled_answers_are_batches_for_kto(bpe: Tokenizer, tmp_path: Path):
    rows = [{"prompt": f"q {n % 30}", "completion": f" yes {n}", "label": n % 3 == 0} for n in range(40)]
    data = make_labelled_data(DATA, bpe, seed=0, batch_size=8, rows=rows)
    batch = data.batch(2)
    index = data.tables.train_index(2)
    assert batch.desirable.tolist() == [rows[i]["label"] for i in index]
    for tokens, trained, i in zip(batch.sequences.tokens, batch.sequences.target_mask, index, strict=True):
        assert bpe.decode(tokens[trained]) == rows[i]["completion"]
    found, valid = next(data.eval_batches())
    assert found.sequences.target_mask.any(1).tolist() == valid.tolist()
    with pytest.raises(UserError, match="column label must be true or false, found str 'good'"):
        make_labelled_data(DATA, bpe, seed=0, batch_size=8, rows=[*rows, rows[0] | {"label": "good"}])
    path = tmp_path / "answers.jsonl"
    path.write_text("not a row\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert purpose_of("kto", Data(path=str(path))) == "labels"
    assert purpose_of("dpo", Data(path=str(path))) == "preferences"
    assert purpose_of("kto", Data(task="reviews")) == "preferences"
    assert purpose_of("kto", Data(path=str(path), columns={"label": "good"})) == "labels"
