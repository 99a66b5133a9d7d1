"""Adapters: they begin at nothing, merge exactly, share their base, and travel in PEFT layout."""

import json
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
    if name == "llama":
        jax.tree.map(np.testing.assert_array_equal, again.params, adapter)
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        assert names[key].shape == (3, 32)
    expected = states(found.spec, join(found.params, adapter))
    np.testing.assert_allclose(states(found.spec, join(found.params, again.params)), expected, atol=1e-5, rtol=0)


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
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match="DoRA"):
        lora.load_adapter(tmp_path / "adapter", found.spec)
    experts = load_checkpoint(ref.checkpoint(tmp_path, "gpt_oss")).spec
    with pytest.raises(UserError, match="merge the adapter"):
        lora.save_adapter(tmp_path / "oss", experts, trained(experts), SETTINGS)
