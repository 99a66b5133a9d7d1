"""Rows 22-33, 45 and 46 of the fault matrix, through the real commands: bad input costs one message, before anything is made."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.faults import stages


@pytest.fixture
def model(finished, tmp_path):
    """A copy of an exported model, to be harmed."""
    return shutil.copytree(finished / "final", tmp_path / "model")


@pytest.fixture
def load(command, sft, model, tmp_path):
    """load(*keys): start a run from that model; (status, text). The run must leave no state behind when it is refused."""
    keys = yaml.safe_load(sft.read_text())
    sft.write_text(yaml.safe_dump(keys | {"model": {"path": str(model)}, "steps": 1}))

    def call(*overrides):
        status, text = command("sft", sft, *overrides)
        assert not (tmp_path / "sft" / "checkpoints").exists() or status == 0
        return status, text

    return call


def weights(model):
    return model / "model.safetensors"


def test_row_22_truncated_weights_are_named_with_their_sizes(load, model):
    data = weights(model).read_bytes()
    weights(model).write_bytes(data[: len(data) // 2])
    status, text = load()
    assert status == 2
    assert "model.safetensors" in text
    assert str(len(data) // 2) in text.replace(",", "").replace("_", "")


def test_row_23_pickles_are_refused_with_the_way_to_convert(load, model):
    weights(model).rename(model / "pytorch_model.bin")
    status, text = load()
    assert status == 2
    assert "pytorch_model.bin" in text
    assert "safetensors" in text


def harm_tensors(model, change):
    tensors = load_file(weights(model))
    change(tensors)
    save_file(tensors, weights(model))


@pytest.mark.parametrize("kind", ["missing", "extra", "shape"])
def test_row_24_tensors_that_do_not_fit_are_listed(load, model, kind):
    names = []

    def change(tensors):
        name = sorted(tensors)[1]
        names.append(name)
        if kind == "missing":
            del tensors[name]
        elif kind == "extra":
            names[0] = "model.layers.0.surprise.weight"
            tensors[names[0]] = np.zeros((2, 3), np.float32)
        else:
            tensors[name] = np.zeros((3, 5), np.float32)

    harm_tensors(model, change)
    status, text = load()
    assert status == 2
    assert names[0] in text


def test_row_25_a_tokenizer_that_is_larger_than_the_embedding_is_refused(load, model):
    settings = json.loads((model / "config.json").read_text())

    def cut(tensors):
        for name in tensors:
            if tensors[name].shape[0] == settings["vocab_size"]:
                tensors[name] = np.ascontiguousarray(tensors[name][:8])

    harm_tensors(model, cut)
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": 8}))
    status, text = load()
    assert status == 2
    assert "8" in text
    assert "tokenizer" in text.lower()


def test_row_26_messages_without_a_template_are_refused(load, model, tmp_path):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = model / name
        if path.exists():
            kept = json.loads(path.read_text()) if name.endswith(".json") else {}
            kept.pop("chat_template", None)
            path.write_text(json.dumps(kept)) if name.endswith(".json") else path.unlink()
    data = tmp_path / "chat.jsonl"
    turn = [{"role": "user", "content": "the bed"}, {"role": "assistant", "content": "was warm ."}]
    data.write_text((json.dumps({"messages": turn}) + "\n") * 40)
    status, text = load("data.task=null", f"data.path={data}")
    assert status == 2
    assert "template" in text


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("optimizr: {}", ["sft.yaml:", "optimizr", "did you mean 'optimizer'"]),
        ("optimizer: {learning_rat: 1}", ["learning_rat", "did you mean"]),
        ("seed: 1\nseed: 2", ["'seed'", "a second time"]),
        ("\tseed: 1", ["tab"]),
        ("steps: 1_0", ["steps"]),
        ("optimizer: {clip_norm: no}", ["clip_norm"]),
        ("steps: -1", ["steps", "at least 1"]),
    ],
)
def test_rows_27_and_28_keys_and_values_that_cannot_be_meant(command, tmp_path, line, pieces):
    (tmp_path / "sft.yaml").write_text(f"out: {tmp_path / 'x'}\n{line}\nmodel: {{path: m}}\ndata: {{path: d}}\n")
    status, text = command("sft", tmp_path / "sft.yaml")
    assert status == 2
    assert all(piece in text for piece in pieces), text
    assert not (tmp_path / "x").exists()


def test_row_28_a_float_as_people_write_it_is_one(command, sft, tmp_path):
    sft.write_text(sft.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    status, text = command("sft", sft, f"out=/proc/nowhere/{tmp_path.name}")
    assert status == 2
    assert "learning_rate" not in text


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device: the mesh asks for eight")
def test_row_29_sizes_that_do_not_divide_are_told_with_their_arithmetic(command, sft):
    status, text = command("sft", sft, "batch_size=12", "mesh.fsdp=8")
    assert status == 2
    assert "batch_size is 12" in text
    assert "nearest" in text


@pytest.fixture
def read(command, sft, tmp_path):
    """read(bytes): fine-tune on a file with that content."""

    def call(content, *keys):
        (tmp_path / "texts.jsonl").write_bytes(content)
        return command("sft", sft, "data.task=null", f"data.path={tmp_path / 'texts.jsonl'}", "steps=1", *keys)

    return call


GOOD = b"".join(json.dumps({"text": f"the bed was warm , number {n} ."}).encode() + b"\n" for n in range(60))


@pytest.mark.parametrize("bad", [b'{"text": "a", }\n', b'{"text": \n', b'{"text": "\xff\xfe"}\n'], ids=["comma", "cut", "utf-8"])
def test_rows_30_and_31_a_line_that_cannot_be_read_is_named_or_skipped(read, bad, tmp_path):
    status, text = read(GOOD + bad + GOOD)
    assert status == 2
    assert f"{tmp_path / 'texts.jsonl'}:61" in text
    status, text = read(GOOD + bad + GOOD, "data.on_bad_rows=skip", f"out={tmp_path / 'skipped'}")
    assert status == 0


def test_row_31_byte_order_mark_and_windows_line_ends_are_accepted(read):
    assert read(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"))[0] == 0


def test_row_32_a_missing_column_shows_those_that_are_there(read):
    status, text = read(b'{"txt": "a b c"}\n' * 50)
    assert status == 2
    assert "txt" in text
    assert "columns" in text


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": "one ."}\n'], ids=["empty", "blank", "one row"])
def test_row_33_too_few_rows_are_counted(read, content):
    status, text = read(content)
    assert status == 2
    assert "texts.jsonl" in text or "rows" in text


def test_row_45_a_pickle_named_safetensors_is_refused(load, model):
    class Bomb:
        def __reduce__(self):
            return (print, ("the pickle was run",))

    weights(model).write_bytes(pickle.dumps(Bomb()))
    status, text = load()
    assert status == 2
    assert "the pickle was run" not in text
    assert "model.safetensors" in text


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd", "linked.safetensors"])
def test_row_45_an_index_that_leaves_the_directory_is_refused(load, model, tmp_path, name):
    weights(model).rename(tmp_path / "outside.safetensors")
    (model / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    tensors = load_file(tmp_path / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    status, text = load()
    assert status == 2
    assert name in text


def test_row_45_a_bomb_of_yaml_aliases_is_refused(command, tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)]
    (tmp_path / "sft.yaml").write_text("\n".join(lines))
    status, text = command("sft", tmp_path / "sft.yaml")
    assert status == 2
    assert "alias" in text


def test_row_46_a_hub_name_without_a_network_names_the_local_form(load):
    status, text = load("model.path=nobody/nothing-1b")
    assert status == 2
    assert "nobody/nothing-1b" in text
    assert "directory" in text or "local" in text


def test_row_46_a_tracker_that_is_not_installed_is_left_out_and_the_run_goes_on(command, sft):
    status, text = command("sft", sft, "steps=1", "log.backends=[mlflow]")
    assert status == 0
    assert "mlflow" in text
    assert stages.rows(sft.parent / "sft" / "metrics.jsonl")
