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


# What the TPU compiler makes of scoring on two slices (2xv5e-16; widths of 256, a device has 64), cut to what is read here:
# a loop over two layers gathers a matrix beside other work, and sums over two ways; then the slices sum a gradient.
TWO_SLICES = """HloModule jit_score, is_scheduled=true

%fused_computation.367 (param_0.1421: bf16[64,64]) -> (bf16[64,64], bf16[64,256], s32[2], u32[]) {
  %param_0.1421 = bf16[64,64]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.244 = bf16[64,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.1421), channel_id=62, replica_groups={{0,4,8,12}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
  ROOT %custom-call.45 = (bf16[64,64]{0,1:T(8,128)(2,1)S(1)}, bf16[64,256]{0,1:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.244), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.478 (param_0.1426: bf16[64,64], param_1.1319: bf16[64,256], param_2.923: s32[2], param_3.473: u32[], param_9.22: bf16[64,256], param_10.30: bf16[4,64,256]) -> (f32[4,64,1,64], bf16[64,64], bf16[64,256], s32[2], u32[]) {
  %param_10.30 = bf16[4,64,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(5)
  %param_9.22 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} parameter(4)
  %convolution.131 = f32[4,64,1,64]{3,1,0,2:T(8,128)S(1)} convolution(%param_10.30, %param_9.22), window={size=1}, dim_labels=0bf_0io->0bf, metadata={op_name="jit(score)/reference/while/body/closed_call/checkpoint/dot_general" stack_frame_id=331}
  %param_0.1426 = bf16[64,64]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.1319 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.246 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} all-gather(%param_0.1426), channel_id=62, replica_groups={{0,4,8,12}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
  %param_2.923 = s32[2]{0:S(4)} parameter(2)
  %param_3.473 = u32[]{:S(2)} parameter(3)
  ROOT %tuple.205 = (f32[4,64,1,64]{3,1,0,2:T(8,128)S(1)}, bf16[64,64]{0,1:T(8,128)(2,1)S(1)}, bf16[64,256]{0,1:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) tuple(%convolution.131, %param_0.1426, %all-gather.246, %param_2.923, %param_3.473)
}

%fused_computation.369 (param_0.1429: bf16[64,64], param_1.1321: bf16[64,256], param_2.925: s32[2], param_3.475: u32[]) -> bf16[64,256] {
  %param_0.1429 = bf16[64,64]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.1321 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.248 = bf16[64,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.1429), channel_id=62, replica_groups={{0,4,8,12}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
  %param_2.925 = s32[2]{0:S(4)} parameter(2)
  %param_3.475 = u32[]{:S(2)} parameter(3)
  ROOT %custom-call.47 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} custom-call(%param_0.1429, %param_1.1321, %all-gather.248, %param_2.925, %param_3.475), custom_call_target="AsyncCollectiveDone"
}

%while_body (param.3: (bf16[4,64,256], bf16[2,64,64], bf16[64,256])) -> (bf16[4,64,256], bf16[2,64,64], bf16[64,256]) {
  %param.3 = (bf16[4,64,256]{2,1,0}, bf16[2,64,64]{2,1,0}, bf16[64,256]{1,0}) parameter(0)
  %get-tuple-element.1 = bf16[4,64,256]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%param.3), index=0
  %get-tuple-element.2 = bf16[2,64,64]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%param.3), index=1
  %get-tuple-element.3 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%param.3), index=2
  %dynamic-slice_bitcast_fusion.13 = bf16[64,64]{0,1:T(8,128)(2,1)S(1)} bitcast(%get-tuple-element.2), metadata={op_name="jit(score)/reference/while/body/jit(dynamic_index_in_dim)/dynamic_slice" stack_frame_id=325}
  %async-collective-start.5 = (bf16[64,64]{0,1:T(8,128)(2,1)S(1)}, bf16[64,256]{0,1:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%dynamic-slice_bitcast_fusion.13), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.367
  %get-tuple-element.1845 = bf16[64,64]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start.5), index=0
  %get-tuple-element.1846 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start.5), index=1
  %get-tuple-element.1847 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start.5), index=2
  %get-tuple-element.1848 = u32[]{:S(2)} get-tuple-element(%async-collective-start.5), index=3
  %fusion.478 = (f32[4,64,1,64]{3,1,0,2:T(8,128)S(1)}, bf16[64,64]{0,1:T(8,128)(2,1)S(1)}, bf16[64,256]{0,1:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%get-tuple-element.1845, %get-tuple-element.1846, %get-tuple-element.1847, %get-tuple-element.1848, %get-tuple-element.3, /*index=5*/%get-tuple-element.1), kind=kOutput, calls=%async_collective_fusion.478, metadata={op_name="jit(score)/reference/while/body/closed_call/checkpoint/dot_general" stack_frame_id=331}
  %get-tuple-element.1855 = bf16[64,64]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.478), index=1
  %get-tuple-element.1856 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.478), index=2
  %get-tuple-element.1858 = s32[2]{0:S(4)} get-tuple-element(%fusion.478), index=3
  %get-tuple-element.1859 = u32[]{:S(2)} get-tuple-element(%fusion.478), index=4
  %async-collective-done.5 = bf16[64,256]{0,1:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.1855, %get-tuple-element.1856, %get-tuple-element.1858, %get-tuple-element.1859), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%fused_computation.369
  %all-reduce.68 = bf16[4,64,256]{2,1,0:T(8,128)(2,1)S(1)} all-reduce(%get-tuple-element.1), channel_id=18, replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, use_global_device_ids=true, to_apply=%add.2.clone
  ROOT %tuple.9 = (bf16[4,64,256]{2,1,0}, bf16[2,64,64]{2,1,0}, bf16[64,256]{1,0}) tuple(%all-reduce.68, %get-tuple-element.2, %async-collective-done.5), metadata={op_name="jit(score)/reference/while/body/add" stack_frame_id=175}
}

%while_condition (param.4: (bf16[4,64,256], bf16[2,64,64], bf16[64,256])) -> pred[] {
  %param.4 = (bf16[4,64,256]{2,1,0}, bf16[2,64,64]{2,1,0}, bf16[64,256]{1,0}) parameter(0)
  ROOT %constant.1 = pred[] constant(true)
}

ENTRY %main (p0: bf16[4,64,256], p1: bf16[2,64,64], p2: bf16[64,256], p3: bf16[32,8,128]) -> bf16[32,8,128] {
  %p0 = bf16[4,64,256]{2,1,0} parameter(0)
  %p1 = bf16[2,64,64]{2,1,0} parameter(1)
  %p2 = bf16[64,256]{1,0} parameter(2)
  %p3 = bf16[32,8,128]{2,1,0} parameter(3)
  %tuple.1 = (bf16[4,64,256]{2,1,0}, bf16[2,64,64]{2,1,0}, bf16[64,256]{1,0}) tuple(%p0, %p1, %p2)
  %while.78 = (bf16[4,64,256]{2,1,0}, bf16[2,64,64]{2,1,0}, bf16[64,256]{1,0}) while(%tuple.1), condition=%while_condition, body=%while_body, backend_config={"known_trip_count":{"n":"2"}}
  %copy.7 = bf16[32,8,128]{2,1,0:T(8,128)(2,1)} copy(%p3), metadata={op_name="jit(learn)/actor/transpose(jvp())/add_any" stack_frame_id=9}
  %after-all.166 = token[] after-all()
  %send.166 = (bf16[32,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%copy.7, %after-all.166), channel_id=66, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.807_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.166 = (bf16[32,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.166), channel_id=65, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.807_0",_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.166 = token[] send-done(%send.166), channel_id=66, is_host_transfer=true
  %recv-done.166 = (bf16[32,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv.166), channel_id=65, is_host_transfer=true
  ROOT %get-tuple-element.9 = bf16[32,8,128]{2,1,0} get-tuple-element(%recv-done.166), index=0
}
"""  # noqa: E501


def test_a_collective_that_runs_beside_other_work_is_one_and_slices_are_seen() -> None:
    """Start, work meanwhile and end name the same all-gather, once a layer; none of them says where it was traced."""
    gather, reduced, across = hlo.Traffic(2, 2 * 64 * 256 * 2.0), hlo.Traffic(2, 2 * 4 * 64 * 256 * 2.0), hlo.Traffic(1, 65536.0)
    whole = {"all-gather": gather, "all-reduce": reduced, "all-reduce between slices": across}
    assert hlo.report(TWO_SLICES).collectives == whole
    assert hlo.report(TWO_SLICES, scope="reference").collectives == {"all-gather": gather, "all-reduce": reduced}
    assert hlo.report(TWO_SLICES, scope="actor").collectives == {"all-reduce between slices": across}
    assert hlo.report(TWO_SLICES, scope="critic").collectives == {}


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%a = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}", 128),  # as on GPUs: operand, result
        ("%a = f32[32]{0} all-reduce-start(%x), to_apply=%add", 128),
        ("%a = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)", 32),
    ],
)
def test_bytes_of_a_collective_are_those_of_its_result(line: str, size: int) -> None:
    text = f"ENTRY %main (x: f32[8]) -> f32[32] {{\n  %x = f32[8]{{0}} parameter(0)\n  {line}\n}}\n"
    ((_, traffic),) = hlo.report(text).collectives.items()
    assert traffic == hlo.Traffic(1, float(size))
