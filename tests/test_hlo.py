"""Loops are counted as often as they run: a scanned program reports what its unrolled twin does."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import config, hlo, parallel
from rlhf_jax.fit_flops import count_flops

LAYERS = 6


def layers(unroll: bool):
    def forward(weights: jax.Array, x: jax.Array) -> jax.Array:
        if unroll:
            for i in range(LAYERS):
                x = jnp.tanh(x @ weights[i])
            return x
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

    return forward


def arguments() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    mesh = parallel.make_mesh(config.Mesh(fsdp=jax.device_count()))
    weights = jax.ShapeDtypeStruct((LAYERS, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp", None)))
    return weights, jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=parallel.batch_sharding(mesh))


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device has no collectives")
def test_collectives_of_a_scan_are_those_of_its_unrolled_twin() -> None:
    scanned, unrolled = (
        hlo.report(jax.jit(layers(unroll)).lower(*arguments()).compile().as_text()).collectives for unroll in (False, True)
    )
    total = [sum(each.bytes for each in found.values()) for found in (scanned, unrolled)]
    assert total[0] == pytest.approx(total[1], rel=0.01)
    assert scanned["all-gather"].count == LAYERS


def test_flops_are_those_of_the_matrix_products() -> None:
    wanted = LAYERS * 2 * 16 * 64 * 64
    for unroll in (False, True):
        jaxpr = jax.make_jaxpr(layers(unroll))(*(jnp.zeros(a.shape) for a in arguments()))
        assert count_flops(jaxpr.jaxpr) == wanted
    gradient = jax.make_jaxpr(jax.grad(lambda w, x: layers(False)(w, x).sum()))(*(jnp.zeros(a.shape) for a in arguments()))
    assert count_flops(gradient.jaxpr) == pytest.approx(3 * wanted, rel=0.01)


def test_a_loop_that_depends_on_data_is_counted_as_told() -> None:
    def decode(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: (c[0] < 9) & (c[1].sum() < 1e9), lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    jaxpr = jax.make_jaxpr(decode)(jnp.zeros((8, 8)))
    assert count_flops(jaxpr.jaxpr, 5) == 5 * 2 * 8**3
    text = jax.jit(decode).lower(jnp.zeros((8, 8))).compile().as_text()
    assert hlo.parse(text, 5).unknown_loops


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[2,3]{1,0}", 24), ("(bf16[4]{0:T(128)}, s32[])", 12), ("pred[7]", 7), ("token[]", 0), ("f32[]", 4)],
)
def test_bytes_of_a_shape(shape: str, size: int) -> None:
    assert hlo.shape_bytes(shape) == size
