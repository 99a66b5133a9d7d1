"""OPT: learned positions that start at row 2; the 350M model normalises after the sum and projects its embeddings."""

from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.families import plain
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, norm, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    if not config.get("layer_norm_elementwise_affine", True):
        raise UserError("config.json: layer_norm_elementwise_affine is false; norms without weights are not supported")
    width, before, bias = config["hidden_size"], config.get("do_layer_norm_before", True), config.get("enable_bias", True)
    projected = config.get("word_embed_proj_dim") or width
    return plain.spec(
        config,
        width=width,
        heads=config["num_attention_heads"],
        number=config["num_hidden_layers"],
        mlp_width=config["ffn_dim"],
        act=act_name(config.get("activation_function", "relu")),
        norms="before" if before else "after_sum",
        final_norm=bool(before and not config.get("_remove_final_layer_norm", False)),
        positions="learned",
        position_rows=config["max_position_embeddings"] + 2,
        position_offset=2,
        embed_width=projected if projected != width else None,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
        max_length=config["max_position_embeddings"],
    )


def rules(spec: Spec) -> list[Rule]:
    layer = "model.decoder.layers.{layer}"
    return [
        *table("model.decoder.embed_tokens", "embed"),
        *table("model.decoder.embed_positions", "positions"),
        *dense("model.decoder.project_in", "project_in"),
        *dense("model.decoder.project_out", "project_out"),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        *dense("lm_head", "head"),
        *(rule for name in "qkv" for rule in dense(f"{layer}.self_attn.{name}_proj", f"layers/attention/{name}")),
        *plain.layer_rules(
            layer,
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            attention_o="self_attn.out_proj",
            mlp_up="fc1",
            mlp_down="fc2",
        ),
    ]


OPT = Family(spec, rules, "OPT", value=None, loads="OPT 125M to 66B (safetensors; some public files are .bin only)")
