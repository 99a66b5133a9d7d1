"""Adapters: they begin at nothing, merge exactly, share their base, and travel in PEFT layout."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref

from rlhf_jax.config import Lora
from rlhf_jax.errors import UserError
from rlhf_jax.models import load_checkpoint, lora, make_model, roles
from rlhf_jax.models import safetensors_file as st
from rlhf_jax.types import Calibration, join

SETTINGS = Lora(rank=3, alpha=6.0)
SCALE = 2.0
FAMILIES = ("llama", "gpt2", "falcon_40b", "phi3", "qwen3_moe")  # apart, fused [in, out], grouped, fused [out, in], experts


def trained(spec, key=1, settings=SETTINGS):
    """An adapter as training leaves it: b is no longer 0."""
    adapter = lora.init(spec, settings, jax.random.key(key))
    return jax.tree.map(lambda x: x if np.any(x) else 0.1 * jax.random.normal(jax.random.key(7), x.shape), adapter)


def states(spec, params, scale=SCALE):
    ids, mask = ref.tokens("rows")
    model = make_model(spec, lora_scale=scale)
    return jnp.where(mask[..., None], jax.jit(model.hidden, compiler_options=ref.FAST)(params, ids, mask), 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_begins_at_nothing_and_merges_to_the_same_function(name, tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, name))
    fresh = lora.init(found.spec, SETTINGS, jax.random.key(0))
    base = states(found.spec, found.params)
    np.testing.assert_array_equal(states(found.spec, join(found.params, fresh)), base)
    adapter = trained(found.spec)
    adapted = states(found.spec, join(found.params, adapter))
    assert np.abs(adapted - base).max() > 1e-2
    merged = lora.merge(found.params, adapter, scale=SCALE)
    assert jax.tree.structure(merged) == jax.tree.structure(found.params)
    np.testing.assert_allclose(states(found.spec, merged), adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_layout_round_trip(name, tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, name))
    adapter = trained(found.spec)
    lora.save_adapter(tmp_path / "adapter", found.spec, adapter, SETTINGS, base="org/base")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA"
    assert (content["r"], content["lora_alpha"], content["base_model_name_or_path"]) == (3, 6.0, "org/base")
    names = st.Reader(tmp_path / "adapter" / "adapter_model.safetensors").entries
    assert all(n.startswith("base_model.model.") and n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names)
    again = lora.load_adapter(tmp_path / "adapter", found.spec)
    assert again.scale == SCALE
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter)  # fused matrices come apart again
    if name == "llama":
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        assert names[key].shape == (3, 32)
    expected = states(found.spec, join(found.params, adapter))
    np.testing.assert_allclose(states(found.spec, join(found.params, again.params)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [("q", "v"), ("o",), ("up", "o")])
def test_what_was_not_adapted_in_a_fused_matrix_stays_so(targets, tmp_path):
    """A run goes on from its own adapter with its own rank and targets; PEFT finds the modules that have one, and no other."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "gpt2"))
    adapter = trained(found.spec, settings=Lora(rank=3, alpha=6.0, targets=targets))
    for tree in (adapter, jax.tree_util.tree_map_with_path(lambda at, x: x * (at[-1].key == "lora_a"), adapter)):  # trained, new
        lora.save_adapter(tmp_path / "adapter", found.spec, tree, SETTINGS)
        jax.tree.map(np.testing.assert_array_equal, lora.load_adapter(tmp_path / "adapter", found.spec).params, tree)
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    modules = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    hit = [m for m in modules if any(m == t or m.endswith(f".{t}") for t in content["target_modules"])]  # as PEFT does
    names = st.Reader(tmp_path / "adapter" / lora.FILE).entries
    assert hit == [m for m in modules if f"base_model.model.{m}.lora_A.weight" in names]


def test_blocks_that_others_filled_stay_one_matrix(tmp_path):
    """PEFT may train our adapter on: what is no longer zero off the blocks belongs to all of them."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "gpt2"))
    adapter = trained(found.spec, settings=Lora(rank=3, alpha=6.0, targets=("q", "v")))
    lora.save_adapter(tmp_path / "adapter", found.spec, adapter, SETTINGS)
    file = tmp_path / "adapter" / lora.FILE
    tensors = {name: np.array(st.Reader(file).array(name)) for name in st.Reader(file).entries}
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    tensors[f"{name}B.weight"][0, 4] = 1.0  # a query, of the key's block
    st.write(file, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    q = lora.load_adapter(tmp_path / "adapter", found.spec).params["layers"]["attention"]["q"]
    assert q["lora_a"].shape[-1] == 9
    whole = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
    np.testing.assert_allclose(q["lora_a"][0] @ q["lora_b"][0], whole[:32].T, atol=1e-6)


def test_adapters_around_the_layers_are_applied(tmp_path):
    """PEFT's all-linear reaches OPT-350m's project_in and project_out."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "opt_350m"))
    lora.save_adapter(tmp_path / "adapter", found.spec, trained(found.spec), SETTINGS)
    file = tmp_path / "adapter" / lora.FILE
    tensors = {name: np.array(st.Reader(file).array(name)) for name in st.Reader(file).entries}
    for name in ("project_in", "project_out"):
        outputs, inputs = found.params[name]["kernel"].shape[::-1]
        for part, shape in (("A", (3, inputs)), ("B", (outputs, 3))):
            values = np.linspace(-0.3, 0.2, shape[0] * shape[1], dtype=np.float32).reshape(shape)
            tensors[f"base_model.model.model.decoder.{name}.lora_{part}.weight"] = values
    st.write(file, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    adapter = lora.load_adapter(tmp_path / "adapter", found.spec).params
    adapted = states(found.spec, join(found.params, adapter))
    np.testing.assert_allclose(states(found.spec, lora.merge(found.params, adapter, scale=SCALE)), adapted, atol=1e-4, rtol=0)


def test_the_text_half_of_a_model_with_a_vision_tower(tmp_path):
    """transformers names its modules otherwise in memory, where PEFT saves, than in the files of the model."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "gemma3_text"))
    spec, adapter = dataclasses.replace(found.spec, model_type="gemma3"), trained(found.spec)
    lora.save_adapter(tmp_path / "adapter", spec, adapter, SETTINGS)
    file, config = tmp_path / "adapter" / lora.FILE, tmp_path / "adapter" / lora.CONFIG
    content = json.loads(config.read_text())
    assert re.fullmatch(content["target_modules"], "model.language_model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(content["target_modules"], "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    names = {name.replace("language_model.model.", "model.language_model."): name for name in st.Reader(file).entries}
    tensors = {new: np.array(st.Reader(file).array(old)) for new, old in names.items()}
    st.write(file, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    first = "model.language_model.layers.0.self_attn.q_proj"
    config.write_text(json.dumps(content | {"alpha_pattern": {first: 12.0}}))
    again = lora.load_adapter(tmp_path / "adapter", spec).params
    q = again["layers"]["attention"]["q"]
    q["lora_b"] = np.array(q["lora_b"]) / np.array([2.0, 1.0, 1.0, 1.0])[:, None, None]  # its alpha is twice the others'
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "only LoRA"),
        ({"bias": "all"}, "only LoRA without biases"),
        *[({key: [1]}, f"{key} is .1., which is more than plain LoRA") for key in lora.CHANGING],
        *[({"init_lora_weights": f"{name}_x"}, f"init_lora_weights is '{name}_x'") for name in lora.CHANGED_BASE],
        ({"r": 0}, "r is 0 and lora_alpha 6.0; must be a whole number above 0"),
        ({"r": None}, "r is None"),
        ({"rank_pattern": {"q_proj": "3"}}, "r is '3'"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_adapters_of_another_kind_are_refused(changes, message, small_adapter):
    directory, spec = small_adapter
    kept = json.loads((directory / lora.CONFIG).read_text())
    (directory / lora.CONFIG).write_text(json.dumps(kept | changes))
    with pytest.raises(UserError, match=message):
        lora.load_adapter(directory, spec)
    (directory / lora.CONFIG).write_text(json.dumps(kept))


def test_an_alpha_of_nothing(small_adapter):
    """Alpha 0 is an adapter that changes nothing, as PEFT reads it; "gaussian" only says where A came from."""
    directory, spec = small_adapter
    kept = json.loads((directory / lora.CONFIG).read_text())
    (directory / lora.CONFIG).write_text(json.dumps(kept | {"lora_alpha": 0, "init_lora_weights": "gaussian"}))
    found = lora.load_adapter(directory, spec).params["layers"]["attention"]["q"]
    (directory / lora.CONFIG).write_text(json.dumps(kept))
    assert np.any(found["lora_a"])
    assert not np.any(found["lora_b"])


@pytest.fixture(scope="module")
def small_adapter(tmp_path_factory):
    """A directory with an adapter of the queries of llama, and its spec."""
    directory = tmp_path_factory.mktemp("small")
    spec = load_checkpoint(ref.checkpoint(directory, "llama")).spec
    settings = Lora(rank=3, alpha=6.0, targets=("q",))
    lora.save_adapter(directory / "adapter", spec, trained(spec, settings=settings), settings)
    return directory / "adapter", spec


def test_decoding_applies_the_adapter(tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, "llama"))
    adapter = trained(found.spec)
    model = make_model(found.spec, lora_scale=SCALE)
    ids, mask = ref.tokens("prompts")
    both = [join(found.params, adapter), lora.merge(found.params, adapter, scale=SCALE)]
    out = [jax.jit(lambda p: ref.greedy(model, p, ids, mask, 6), compiler_options=ref.FAST)(p) for p in both]
    np.testing.assert_array_equal(out[0], out[1])
    assert model.axes(adapter)["layers"]["mlp"]["down"] == {
        "lora_a": ("layers", "mlp", None),
        "lora_b": ("layers", None, "embed"),
    }
    assert model.axes(model.for_decoding(both[0]))["layers"][0]["attention"]["q"]["lora_b"] == (None, "heads")


def test_actor_critic_and_reward_model_share_one_base(tmp_path):
    """Three roles, one copy of the base: the arrays are the same objects, and gradients are of the adapter's size."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "llama"))
    base = lora.frozen_part(found.params)
    head = roles.reward_model(found.spec, found.params, jax.random.key(0))["score"]
    trees = {role: trained(found.spec, key) | extra for role, key, extra in
             (("actor", 1, {}), ("critic", 2, {"score": head}), ("reward", 3, {"score": head}))}  # fmt: skip
    whole = {role: join(base, adapter) for role, adapter in trees.items()}
    kernels = {role: id(tree["layers"]["mlp"]["up"]["kernel"]) for role, tree in whole.items()}
    assert set(kernels.values()) == {id(base["layers"]["mlp"]["up"]["kernel"])}
    distinct = {id(x): x.nbytes for tree in whole.values() for x in jax.tree.leaves(tree)}
    own = sum(x.nbytes for tree in trees.values() for x in jax.tree.leaves(tree))
    shared = head["kernel"].nbytes  # one head object in two trees
    assert sum(distinct.values()) == sum(x.nbytes for x in jax.tree.leaves(base)) + own - shared
    np.testing.assert_array_equal(states(found.spec, base), states(found.spec, found.params))  # the reference
    model, (ids, mask) = make_model(found.spec, lora_scale=SCALE), ref.tokens("rows")

    def value(adapter):
        tree = join(base, adapter)
        return jnp.sum(jnp.where(mask, model.score(tree, model.hidden(tree, ids, mask)), 0.0))

    gradient = jax.jit(jax.grad(value), compiler_options=ref.FAST)(trees["critic"])
    assert jax.tree.structure(gradient) == jax.tree.structure(trees["critic"])
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(gradient))


def test_ranks_and_scales_that_differ_by_matrix_are_read_as_peft_reads_them(tmp_path):
    """Patterns match the end of a module's name; a stack takes its largest rank, the others are filled up with zeros."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "llama"))
    adapter = trained(found.spec, settings=Lora(rank=4, alpha=8.0, targets=("q", "down")))
    q = adapter["layers"]["attention"]["q"]
    q["lora_a"], q["lora_b"] = q["lora_a"].at[0, :, 2:].set(0.0), q["lora_b"].at[0, 2:].set(0.0)
    lora.save_adapter(tmp_path / "adapter", found.spec, adapter, Lora(rank=4, alpha=8.0), base="org/base")
    file, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    tensors = {name: np.array(st.Reader(file).array(name)) for name in st.Reader(file).entries}
    for name in [name for name in tensors if "layers.0.self_attn.q_proj" in name]:
        tensors[name] = tensors[name][:2] if "lora_A" in name else np.ascontiguousarray(tensors[name][:, :2] / 3)
    st.write(file, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    changes = {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 12.0}}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))  # 12 / 2 is three times 8 / 4
    again = lora.load_adapter(tmp_path / "adapter", found.spec)
    assert (again.scale, again.base) == (2.0, "org/base")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again.params, adapter)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {"(": 2}}))
    with pytest.raises(UserError, match="no regular expression"):
        lora.load_adapter(tmp_path / "adapter", found.spec)
    tensors = {name: x[:, :5] if "lora_A" in name else x for name, x in tensors.items()}
    st.write(file, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    with pytest.raises(UserError, match=r"must be \[rank, 32\]"):
        lora.load_adapter(tmp_path / "adapter", found.spec)


def test_a_score_head_travels_with_the_adapter(tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, "llama"), head="value", zero_head=True)
    adapter = trained(found.spec) | {"score": {"kernel": jnp.ones((32, 1)), "bias": jnp.ones(1)}}
    lora.save_adapter(tmp_path / "adapter", found.spec, adapter, SETTINGS, head="value")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["task_type"] == "TOKEN_CLS"
    assert content["modules_to_save"] == ["score"]
    again = lora.load_adapter(tmp_path / "adapter", found.spec, head="value")
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter)
    assert again.calibration == Calibration()
    gpt2 = load_checkpoint(ref.checkpoint(tmp_path, "gpt2"), head="value", zero_head=True)
    adapter = trained(gpt2.spec) | {"score": {"kernel": jnp.ones((32, 1)), "bias": jnp.ones(1)}}
    lora.save_adapter(tmp_path / "gpt2-critic", gpt2.spec, adapter, SETTINGS, head="value", calibration=Calibration(0.5, 2.0))
    content = json.loads((tmp_path / "gpt2-critic" / "adapter_config.json").read_text())
    assert content["modules_to_save"] == ["classifier"]  # as transformers calls it there
    again = lora.load_adapter(tmp_path / "gpt2-critic", gpt2.spec, head="value")
    np.testing.assert_array_equal(again.params["score"]["kernel"], 1.0)
    assert again.calibration == Calibration(0.5, 2.0)


def test_targets_and_adapters_that_do_not_fit(tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, "gpt2"))
    with pytest.raises(UserError, match="'w' is not one of q, k"):
        lora.init(found.spec, Lora(targets=("w",)), jax.random.key(0))
    with pytest.raises(UserError, match="none of gate"):
        lora.init(found.spec, Lora(targets=("gate",)), jax.random.key(0))
    only = lora.init(found.spec, Lora(targets=("q", "up")), jax.random.key(0))
    assert {k: set(v) for k, v in only["layers"].items()} == {"attention": {"q"}, "mlp": {"up"}}
    lora.save_adapter(tmp_path / "adapter", found.spec, trained(found.spec, settings=SETTINGS), SETTINGS)
    other = load_checkpoint(ref.checkpoint(tmp_path, "llama")).spec
    with pytest.raises(UserError, match="do not belong"):
        lora.load_adapter(tmp_path / "adapter", other)
    experts = load_checkpoint(ref.checkpoint(tmp_path, "gpt_oss")).spec
    with pytest.raises(UserError, match="merge the adapter"):
        lora.save_adapter(tmp_path / "oss", experts, trained(experts), SETTINGS)
