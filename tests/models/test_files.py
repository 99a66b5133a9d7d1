"""Directories in Hugging Face layout: round trips, both spellings of the configuration, roles, and what is refused."""

import errno
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
import variants as cases

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.models import load_checkpoint, make_model, read_spec, roles, save_checkpoint, scratch_spec
from rlhf_jax.models import safetensors_file as st
from rlhf_jax.types import Calibration


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: r.array(name) for path in sorted(directory.glob("*.safetensors")) for r in [st.Reader(path)] for name in r.entries
    }


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_every_family_returns_bit_for_bit(name, tmp_path):
    source = ref.checkpoint(tmp_path, name)
    found = load_checkpoint(source)
    out = save_checkpoint(tmp_path / "out", found.spec, found.params, source=source)
    assert_same_bits(tensors_of(source), tensors_of(out))
    assert read_spec(out) == found.spec  # both spellings of the rope are written, and neither changes what is read


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox", "phi3"])
def test_every_storage_dtype_returns_bit_for_bit(name, dtype, tmp_path):
    found = ref.reference(name)
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    tensors = {n: x.astype(numpy_dtype) for n, x in found.tensors.items()}
    source = ref.write(tmp_path / "in", found.config | {"dtype": dtype}, tensors)
    loaded = load_checkpoint(source)
    assert loaded.dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    out = save_checkpoint(tmp_path / "out", loaded.spec, loaded.params)
    assert_same_bits(tensors, tensors_of(out))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


@pytest.mark.parametrize("said", ["auto", "float32", "float16", None])
def test_the_stored_dtype_is_that_of_the_files(said, tmp_path):
    """Of each tensor; config.json may say another, "auto" or none. What the files lack has that of most weights."""
    found = ref.reference("llama")
    tensors = {name: x.astype(np.float32 if "norm" in name else ml_dtypes.bfloat16) for name, x in found.tensors.items()}
    config = {key: value for key, value in found.config.items() if key not in ("dtype", "torch_dtype")}
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    source = ref.write(tmp_path / "in", config | ({} if said is None else {"dtype": said}), bare)
    loaded = load_checkpoint(source)
    out = save_checkpoint(tmp_path / "out", loaded.spec, loaded.params, source=source)
    assert_same_bits(tensors, tensors_of(out))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    reward = roles.reward_model(loaded.spec, loaded.params, jax.random.key(0))
    written = tensors_of(save_checkpoint(tmp_path / "reward", loaded.spec, reward, head="score", source=source))
    assert written["score.weight"].dtype == ml_dtypes.bfloat16
    gone = tensors_of(save_checkpoint(tmp_path / "gone", loaded.spec, loaded.params, source=tmp_path / "nowhere"))
    assert {x.dtype for x in gone.values()} == {np.dtype(said if said and said != "auto" else "float32")}


def test_shards_are_cut_by_size_and_indexed(tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    found = load_checkpoint(source)
    out = save_checkpoint(tmp_path / "out", found.spec, found.params, shard_bytes=20_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((out / name).stat().st_size < 25_000 for name in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_of(out).values())
    assert_same_bits(tensors_of(source), tensors_of(out))
    again = load_checkpoint(out)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    save_checkpoint(out, found.spec, found.params)  # replaces, stale shards and all
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".out*"))


def test_the_stock_reader_agrees(tmp_path):
    """Files are those of the safetensors library, metadata included."""
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    source = ref.checkpoint(tmp_path, "opt_350m")
    theirs = numpy.load_file(source / "model.safetensors")
    assert_same_bits(tensors_of(source), theirs)
    with safetensors.safe_open(source / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_each_process_reads_its_own_shards(tmp_path):
    """Any sharding gives the same arrays: rows, columns, heads that the file interleaves, experts."""
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for name in ("falcon_40b", "qwen3_moe", "gpt2"):
        source = ref.checkpoint(tmp_path, name)
        whole = load_checkpoint(source)

        def split(shapes):
            def of(x):
                axes = [None] * x.ndim
                for dim in (x.ndim - 1, x.ndim - 2, 0):
                    for axis in ("b", "a"):
                        if dim >= 0 and axes[dim] is None and axis not in axes and x.shape[dim] % mesh.shape[axis] == 0:
                            axes[dim] = axis
                            break
                return NamedSharding(mesh, PartitionSpec(*axes))

            return jax.tree.map(of, shapes)

        parts = load_checkpoint(source, shardings=split)
        jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
        assert len(parts.params["embed"]["embedding"].sharding.device_set) == 8
        out = save_checkpoint(tmp_path / f"{name}-out", parts.spec, parts.params)
        assert_same_bits(tensors_of(source), tensors_of(out))


# ------------------------------------------------------------------------------------------ names of other writers


def test_bare_trunks_buffers_and_stored_tied_heads_load_too(tmp_path):
    gpt2 = ref.reference("gpt2")
    bare = {n.removeprefix("transformer."): x for n, x in gpt2.tensors.items()}
    bare |= {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)) for i in range(2)}
    neox = ref.reference("gpt_neox")
    buffers = {f"gpt_neox.layers.0.attention.{n}": np.zeros(s, np.float32) for n, s in
               (("bias", (1, 1, 8, 8)), ("masked_bias", ()), ("rotary_emb.inv_freq", (2,)))}  # fmt: skip
    in_memory = {n.replace("embed_out", "lm_head"): x for n, x in neox.tensors.items()}
    tied = ref.reference("llama_tied_odd_heads")
    stored = tied.tensors | {"lm_head.weight": tied.tensors["model.embed_tokens.weight"]}
    for name, found, tensors in (("gpt2", gpt2, bare), ("neox", neox, in_memory | buffers), ("tied", tied, stored)):
        usual = load_checkpoint(ref.write(tmp_path / f"{name}-usual", found.config, found.tensors))
        other = load_checkpoint(ref.write(tmp_path / name, found.config, tensors))
        jax.tree.map(np.testing.assert_array_equal, usual.params, other.params)


def test_multimodal_gemma_keeps_its_other_towers(tmp_path):
    text = ref.reference("gemma3_text")
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text.config,
              "vision_config": {"hidden_size": 4}}  # fmt: skip
    vision = {"vision_tower.patch.weight": np.ones((3, 2), np.float32), "multi_modal_projector.w": np.zeros(5, np.float32)}
    expected = load_checkpoint(ref.write(tmp_path / "text", text.config, text.tensors)).params
    for prefix in ("language_model.", "model.language_model."):
        renamed = {
            n.replace("model.", prefix if prefix.startswith("model") else prefix + "model.", 1): x
            for n, x in text.tensors.items()
        }
        source = ref.write(tmp_path / prefix, config, renamed | vision)
        found = load_checkpoint(source)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected)
        out = save_checkpoint(tmp_path / f"out-{prefix}", found.spec, found.params, source=source)
        saved = tensors_of(out)
        assert {n for n in saved if "vision" in n or "projector" in n} == set(vision)
        assert "language_model.model.norm.weight" in saved
        written = json.loads((out / "config.json").read_text())
        assert "rope_theta" in written["text_config"]
        assert "rope_theta" not in written
    with pytest.raises(UserError, match="source"):
        save_checkpoint(tmp_path / "alone", found.spec, found.params)


def test_version_four_spells_the_rope_otherwise(tmp_path):
    """Every spelling that transformers 4 had gives the spec of the new one."""
    spellings = {
        "llama_tied_odd_heads": lambda p: {"rope_theta": p.pop("rope_theta"), "rope_scaling": p},
        "llama_linear_biases": lambda p: {"rope_theta": p.pop("rope_theta"), "rope_scaling": {"type": p.pop("rope_type")} | p},
        "gpt_neox": lambda p: {"rotary_emb_base": p["rope_theta"], "rotary_pct": p["partial_rotary_factor"]},
        "phi": lambda p: {"rope_theta": p["rope_theta"], "partial_rotary_factor": p["partial_rotary_factor"]},
        "gemma3_text": lambda p: {"rope_theta": 1000.0, "rope_local_base_freq": 50.0,
                                  "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "olmo3": lambda p: {"rope_theta": 500000.0,
                            "rope_scaling": {k: v for k, v in p["full_attention"].items() if k != "rope_theta"}},
        "phi3": lambda p: {"rope_theta": p["rope_theta"], "partial_rotary_factor": p["partial_rotary_factor"],
                           "original_max_position_embeddings": p["original_max_position_embeddings"],
                           "rope_scaling": {"type": "su"} | {k: p[k] for k in ("short_factor", "long_factor")}},
    }  # fmt: skip
    for name, spell in spellings.items():
        config = dict(ref.reference(name).config)
        new = read_spec(ref.write(tmp_path / name, config, {}))
        old = config | spell(dict(config.pop("rope_parameters")))
        assert read_spec(ref.write(tmp_path / f"{name}-old", old, {})) == new, name


@pytest.mark.parametrize("name", cases.TWO_ROPES)
def test_the_older_key_of_the_rope_wins_as_in_transformers_5(name, tmp_path):
    """Two spellings that differ: the one that counts is the one that comes back, under both keys."""
    config = ref.reference(name).config
    parameters, scaling = config["rope_parameters"], cases.TWO_ROPES[name]
    both = read_spec(ref.write(tmp_path / "both", config | {"rope_scaling": scaling}, {}))
    assert both != read_spec(ref.write(tmp_path / "newer", config, {}))
    full = parameters.get(cases.FULL)
    alone = {"rope_scaling": scaling, "rope_parameters": parameters | {cases.FULL: full | scaling} if full else None}
    assert both == read_spec(ref.write(tmp_path / "alone", config | alone, {}))
    source = ref.checkpoint(tmp_path, name)
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    found = load_checkpoint(source)
    out = save_checkpoint(tmp_path / "out", found.spec, found.params)
    written = json.loads((out / "config.json").read_text())
    assert scaling.items() <= written["rope_scaling"].items()
    assert read_spec(out) == both
    again = load_checkpoint(out)
    assert read_spec(save_checkpoint(tmp_path / "again", again.spec, again.params)) == both
    edited = ref.write(tmp_path / "edited", written | {"rope_scaling": scaling | {"factor": 16.0}}, {})
    assert read_spec(edited) != both


def test_gemma_says_gelu_and_means_tanh(tmp_path):
    config = ref.reference("gemma").config
    assert read_spec(ref.write(tmp_path, config | {"hidden_act": "gelu"}, {})).act == "gelu_pytorch_tanh"


# ---------------------------------------------------------------------------------------------------------- roles


def test_reward_model_and_critic_are_written_and_read(tmp_path):
    source = ref.checkpoint(tmp_path, "qwen3")
    actor = load_checkpoint(source)
    model = make_model(actor.spec)
    ids, mask = ref.tokens("rows")
    states = jax.jit(model.hidden)(actor.params, ids, mask)
    reward = roles.reward_model(actor.spec, actor.params, jax.random.key(0))
    assert reward["layers"] is actor.params["layers"]
    assert "head" not in reward
    raw = model.score(reward, states)

    out = save_checkpoint(tmp_path / "reward", actor.spec, reward, head="score", calibration=Calibration(0.5, 2.0))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["problem_type"] == "regression"
    assert config["pad_token_id"] == 0
    assert "score.weight" in tensors_of(out)
    assert "score.bias" not in tensors_of(out)
    again = load_checkpoint(out, head="score")
    assert again.calibration == Calibration(0.5, 2.0, pad_id=0)
    assert not again.drawn
    np.testing.assert_array_equal(model.score(again.params, states), raw)

    calibrated = (raw - 0.5) / 2.0
    np.testing.assert_allclose(
        model.score(roles.critic(actor.spec, reward, Calibration(0.5, 2.0)), states), calibrated, atol=1e-6
    )
    critic = load_checkpoint(out, head="value")  # the calibration enters the head
    np.testing.assert_allclose(model.score(critic.params, states), calibrated, atol=1e-6)
    saved = save_checkpoint(tmp_path / "critic", actor.spec, critic.params, head="value")
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["Qwen3ForTokenClassification"]
    back = load_checkpoint(saved, head="value")
    np.testing.assert_array_equal(model.score(back.params, states), model.score(critic.params, states))
    as_reward = load_checkpoint(saved, head="score")  # a bias belongs to the calibration
    shifted = (model.score(as_reward.params, states) - as_reward.calibration.mean) / as_reward.calibration.std
    np.testing.assert_allclose(shifted, calibrated, atol=1e-6)

    fresh = roles.critic(actor.spec, actor.params)
    assert np.all(model.score(fresh, states) == 0)
    assert roles.reference(actor.params) is actor.params
    assert roles.reference(actor.params, jnp.bfloat16)["embed"]["embedding"].dtype == jnp.bfloat16


def test_no_reward_model_is_written_with_a_padding_token_that_ends_answers(tmp_path):
    """transformers would score the token before the end; what is read from such a directory keeps its own."""
    found = ref.reference("gpt2")
    source = ref.write(tmp_path / "lm", found.config | {"pad_token_id": 2}, found.tensors)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    actor = load_checkpoint(source)
    reward = roles.reward_model(actor.spec, actor.params, jax.random.key(0))
    out = save_checkpoint(tmp_path / "reward", actor.spec, reward, head="score", source=source)
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] is None
    assert load_checkpoint(out, head="score").calibration.pad_id is None
    (out / "config.json").write_text(json.dumps(config | {"pad_token_id": 2}))
    theirs = load_checkpoint(out, head="score")
    assert theirs.calibration.pad_id == 2
    copy = save_checkpoint(
        tmp_path / "copy", theirs.spec, theirs.params, head="score", source=out, calibration=theirs.calibration
    )
    assert json.loads((copy / "config.json").read_text())["pad_token_id"] == 2


def test_a_critic_whose_family_has_no_token_classifier(tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, "opt_350m"), head="value", zero_head=True)
    assert found.drawn == ("score",)
    assert found.params["score"]["kernel"].shape == (20, 1)
    out = save_checkpoint(tmp_path / "critic", found.spec, found.params, head="value")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["OPTForSequenceClassification"]
    assert tensors_of(out)["score.bias"].shape == (1,)
    gpt2 = load_checkpoint(ref.checkpoint(tmp_path, "gpt2"), head="value", zero_head=True)
    out = save_checkpoint(tmp_path / "gpt2-critic", gpt2.spec, gpt2.params, head="value")
    assert tensors_of(out)["classifier.weight"].shape == (1, 32)


@pytest.mark.parametrize("name", ["score", "classifier", "value_head", "v_head", "v_head.summary"])
@pytest.mark.parametrize("wrapper", ["", "pretrained_model."])
def test_scalar_heads_of_other_trainers(name, wrapper, tmp_path):
    found = ref.reference("llama")
    weight = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    tensors = {wrapper + n: x for n, x in found.tensors.items()} | {
        f"{name}.weight": weight,
        f"{name}.bias": np.ones(1, np.float32),
    }
    loaded = load_checkpoint(ref.write(tmp_path, found.config, tensors), head="value")
    np.testing.assert_array_equal(loaded.params["score"]["kernel"][:, 0], weight[0])
    assert loaded.params["score"]["bias"] == 1
    assert "head" not in loaded.params


def test_special_tokens_and_generation_config(tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "top_p": 0.8}))
    (source / "tokenizer.json").write_text('{"some": "json"}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "x": 1}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    found = load_checkpoint(source)
    assert found.tokens.stop_ids == (2, 5)
    assert found.tokens.pad_id == 0
    out = save_checkpoint(tmp_path / "out", found.spec, found.params, source=source, generation_config={"top_p": 1.0})
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5]
    assert generation["top_p"] == 1.0
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast", "x": 1}


def test_a_failed_save_leaves_what_was_there(tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, "llama"))
    out = save_checkpoint(tmp_path / "out", found.spec, found.params)
    before = tensors_of(out)
    broken = {**found.params, "final_norm": {"scale": np.ones(3, np.float32)}}
    with pytest.raises(ValueError, match="reshape|broadcast"):
        save_checkpoint(out, found.spec, broken)
    assert_same_bits(before, tensors_of(out))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_checkpoint(tmp_path / "notes", found.spec, found.params)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    spec = scratch_spec(testing.tiny_scratch(), 16)
    with pytest.raises(UserError, match="cannot be written there"):
        save_checkpoint(tmp_path / "file" / "model", spec, make_model(spec).init(jax.random.key(0)))


@pytest.mark.parametrize("call", ["os.fsync", "shutil.copyfile"])  # of the weights, of the tokenizer
def test_a_disk_that_is_full_is_one_message_and_nothing_stays(tmp_path, monkeypatch, call):
    source = ref.checkpoint(tmp_path, "llama")
    (source / "tokenizer.json").write_text("{}")
    found = load_checkpoint(source)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(UserError, match=r"out: cannot be written there \(No space left on device: .*\); free \d+ MB and"):
        save_checkpoint(tmp_path / "new" / "out", found.spec, found.params, source=source)
    assert list((tmp_path / "new").iterdir()) == []
