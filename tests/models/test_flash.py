"""The TPU kernel, interpreted on CPU, against dense attention: values and gradients, padding, packing, windows, soft-caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import parallel
from rlhf_jax.config import Mesh, Scratch
from rlhf_jax.models import attention as attn
from rlhf_jax.models import flash, make_model, scratch_spec, spec_of

GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attn_logit_softcapping": 4.0,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("windows", "index"), [([None], 0), ([6, None], "traced 0"), ([6, None], "traced 1")])
def test_splash_computes_what_dense_attention_does(windows, index, packed):
    rows, length = 3, 40
    q, k, v, weights = (jax.random.normal(jax.random.key(i), (rows, length, heads, 16)) for i, heads in enumerate((4, 2, 2, 4)))
    mask = np.ones((rows, length), bool)
    mask[0, :7], mask[1, 33:] = False, False
    segments = jnp.asarray(np.broadcast_to(np.arange(length) > 20, (rows, length)).astype(np.int32)) if packed else None
    positions = jnp.asarray(np.maximum(mask.cumsum(1) - 1, 0))
    keys = attn.causal(jnp.asarray(mask), positions, segments)
    spec = spec_of(GEMMA2)
    which = jnp.int32(int(index[-1])) if isinstance(index, str) else index

    def run(attend):
        def total(q, k, v):
            out = jnp.where(mask[..., None, None], attend(q, k, v, which, 0.25, None), 0.0)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, dense), dense_gradient = run(attn.make_dense(spec, keys, windows))
    (_, splash), splash_gradient = run(flash.make_splash(spec, keys, windows, None, interpret=True))
    np.testing.assert_allclose(splash, dense, atol=2e-6, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), splash_gradient, dense_gradient)
    for attend in (attn.make_dense(spec, keys, windows), flash.make_splash(spec, keys, windows, None, interpret=True)):
        last = jax.jit(attend)(q[:, -11:], k, v, which, 0.25, None)
        np.testing.assert_allclose(jnp.where(mask[:, -11:, None, None], last, 0.0), dense[:, -11:], atol=2e-6, rtol=0)


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device has no shards")
@pytest.mark.parametrize("by_shard", [False, True], ids=["whole batch", "each shard by itself"])
def test_splash_on_a_mesh_is_that_of_one_device(by_shard):
    """Also within `each_shard`, where a rollout of `sampling.rows` prefills."""
    mesh = parallel.make_mesh(Mesh(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    q, k, v = (jax.random.normal(jax.random.key(i), (8, 24, heads, 16)) for i, heads in enumerate((4, 2, 2)))

    def run(mesh, qkv):
        keys = attn.causal(jnp.ones(qkv[0].shape[:2], bool), jnp.broadcast_to(jnp.arange(24), qkv[0].shape[:2]), None)
        return flash.make_splash(spec_of(GEMMA2), keys, [None], mesh, interpret=True)(*qkv, 0, 0.25, None)

    here = parallel.each_shard(lambda _, qkv, key: run(mesh, qkv), mesh) if by_shard else lambda _, qkv, key: run(mesh, qkv)
    got = jax.jit(here)((), parallel.place((q, k, v), parallel.batch_sharding(mesh)), jnp.int32(0))
    np.testing.assert_allclose(got, run(None, (q, k, v)), atol=2e-6, rtol=0)


def test_flash_on_cpu_is_dense_and_says_so_once():
    spec = scratch_spec(Scratch(width=32, layers=1, heads=4, kv_heads=2, mlp_width=48), 64)
    with pytest.warns(UserWarning, match="no flash kernel for cpu") as caught:
        model = make_model(spec, attention="flash")
    params = model.init(jax.random.key(0))
    ids = np.ones((1, 5), np.int32)
    np.testing.assert_array_equal(model.hidden(params, ids, ids > 0), make_model(spec).hidden(params, ids, ids > 0))
    assert len(caught) == 1
    with pytest.raises(ValueError, match="must be dense or flash"):
        make_model(spec, attention="fast")


class _Device:
    def __init__(self, platform):
        self.platform = platform


class _Mesh:
    def __init__(self, platform):
        self.devices = np.asarray([_Device(platform)])


def test_each_platform_gets_the_kernel_it_has():
    llama = scratch_spec(Scratch(width=32, layers=1, heads=4, kv_heads=2, mlp_width=48), 64)
    assert flash.resolve("flash", llama, jnp.float32, _Mesh("tpu")) == "splash"
    assert flash.resolve("flash", llama, jnp.bfloat16, _Mesh("gpu")) == "cudnn"
    assert flash.resolve("dense", llama, jnp.bfloat16, _Mesh("gpu")) == "dense"
    for spec, dtype, reason in ((llama, jnp.float32, "float32"), (spec_of(GEMMA2), jnp.bfloat16, "soft-caps")):
        with pytest.warns(UserWarning, match=reason):
            assert flash.resolve("flash", spec, dtype, _Mesh("gpu")) == "dense"
