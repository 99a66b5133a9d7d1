"""What is refused when a model is loaded: one message, nothing loaded."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref

from rlhf_jax import model_keys
from rlhf_jax.errors import UserError
from rlhf_jax.models import families, hf, load_checkpoint, spec_of


def refused(directory: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tensors_that_do_not_fit_are_named_with_their_shapes(tmp_path):
    found = ref.reference("llama")
    names = sorted(n for n in found.tensors if "layers" in n)
    missing = {n: x for n, x in found.tensors.items() if n not in names[:7]}
    message = refused(ref.write(tmp_path / "a", found.config, missing))
    assert "7 missing" in message
    assert "and 2 more" in message
    assert f"{names[0]} [32]" in message
    assert "Nothing was loaded" in message
    message = refused(ref.write(tmp_path / "b", found.config, found.tensors | {"model.extra": np.ones((2, 3), np.float32)}))
    assert "1 unexpected: model.extra [2, 3]" in message
    wrong = found.tensors | {"model.norm.weight": np.ones(31, np.float32)}
    message = refused(ref.write(tmp_path / "c", found.config, wrong))
    assert "model.norm.weight [31] F32 (must be [32])" in message
    headless = {n: x for n, x in found.tensors.items() if n != "lm_head.weight"}
    message = refused(ref.write(tmp_path / "d", found.config, headless))
    assert "tie_word_embeddings is false" in message
    assert "lm_head.weight [96, 32]" in message


def test_truncated_and_damaged_files(tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    path = source / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert f"need {len(whole)} bytes, the file has {len(whole) - 100}" in refused(source)
    path.write_bytes(whole[:50])
    assert "truncated" in refused(source)
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    first, second = sorted(name for name in header if name.endswith("norm.weight"))[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[length:])
    assert f"{first} and {second} share bytes" in refused(source)
    for content in (b"", b"abc", b"\xff" * 64, (20).to_bytes(8, "little") + b"{" * 20):
        path.write_bytes(content)
        assert str(path) in refused(source)


def test_architectures_that_are_not_supported(tmp_path):
    found = ref.reference("llama")
    message = refused(ref.write(tmp_path / "a", found.config | {"model_type": "qwen2_moe"}, found.tensors))
    assert "'qwen2_moe' is not supported" in message
    assert "nearest is 'qwen3_moe'" in message
    message = refused(ref.write(tmp_path / "b", found.config | {"auto_map": {"AutoModel": "x.Y"}}, found.tensors))
    assert "auto_map" in message
    assert "never run" in message
    message = refused(ref.write(tmp_path / "c", found.config | {"quantization_config": {"quant_method": "gptq"}}, found.tensors))
    assert "gptq" in message
    message = refused(ref.write(tmp_path / "d", found.config | {"hidden_act": "mystery"}, found.tensors))
    assert "mystery" in message
    assert "silu" in message
    message = refused(ref.write(tmp_path / "e", found.config | {"rope_parameters": {"rope_type": "spiral"}}, found.tensors))
    assert "spiral" in message
    assert "longrope" in message
    lacking = {k: v for k, v in found.config.items() if k != "num_hidden_layers"}
    assert "num_hidden_layers is missing" in refused(ref.write(tmp_path / "f", lacking, found.tensors))
    nameless = {k: v for k, v in found.config.items() if k != "model_type"}
    message = refused(ref.write(tmp_path / "f", nameless, found.tensors))
    assert "model_type is missing" in message
    assert "nearest" not in message
    (tmp_path / "f" / "config.json").write_text("{")
    assert "JSON" in refused(tmp_path / "f")
    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "60 rows" not in refused(ref.checkpoint(tmp_path, "llama"), real_vocab=1000)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", "2", 'num_hidden_layers is "2"; it must be a whole number of at least 1'),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("hidden_size", None, "hidden_size is null"),
        ("hidden_size", 32.0, "hidden_size is 32.0"),
        ("vocab_size", True, "vocab_size is true"),
        ("rms_norm_eps", "1e-5", "a number above 0"),
        ("tie_word_embeddings", "false", "true, false or null"),
        ("rope_parameters", "linear", "an object"),
        ("rope_parameters", {"rope_type": "linear", "factor": "four"}, 'rope_parameters.factor is "four"'),
        ("rope_parameters", {"rope_type": "linear", "factor": None}, "has no factor"),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": ["1"]}, "a list of numbers"),
        ("quantization_config", "fp8", "an object"),
        ("text_config", [1], "text_config is [1]"),
        ("text_config", {"head_dim": "16"}, 'text_config.head_dim is "16"'),
        ("model_type", ["llama"], "text"),
        ("architectures", "LlamaForCausalLM", "a list of texts"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file_and_key(key, value, message, tmp_path):
    found = ref.reference("llama")
    told = refused(ref.write(tmp_path, found.config | {key: value}, {}))
    assert "config.json: " in told
    assert message in told


def test_the_kind_of_every_key_that_a_family_reads_is_known():
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(families.__file__).parent.glob("*.py"))]
    read = {key for text in texts for key in re.findall(r'config(?:\.get\(|\[)"(\w+)"', text)}
    assert len(read) > 40
    assert read <= model_keys.RULES.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "depends on the length"),
        ({"model_type": "phi", "tie_word_embeddings": True, "max_position_embeddings": 64}, "the output layer has a bias"),
    ],
)
def test_configurations_whose_numbers_would_be_others(config, message):
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UserError, match=message):
        spec_of(sizes | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "rms_norm_eps": 1e-5, "rope_theta": 1e4} | config)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    message = refused(source)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message
    assert "import AutoModelForCausalLM, AutoTokenizer" in message
    for kind in ("SequenceClassification", "TokenClassification"):  # whose head AutoModelForCausalLM would drop
        config = ref.reference("llama").config | {"architectures": [f"LlamaFor{kind}"]}
        (source / "config.json").write_text(json.dumps(config))
        assert f"import AutoModelFor{kind}, AutoTokenizer" in refused(source, head="score")
    (source / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor" in refused(source)
    (source / "adapter_model.safetensors").write_bytes(b"")
    assert "LoRA adapter" in refused(source)
    (source / "config.json").unlink()
    assert "LoRA adapter" in refused(source)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", ".hidden.safetensors", "x.bin"]
)
def test_an_index_names_files_of_its_own_directory_only(name, tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    index = {"weight_map": dict.fromkeys(ref.reference("llama").tensors, name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    assert "same directory" in refused(source)


def test_weights_that_are_there_twice_are_refused(tmp_path):
    """transformers reads the one file, and whoever trusts the index reads the other files."""
    source = ref.checkpoint(tmp_path, "llama")

    def name_in_index(name):
        index = {"weight_map": dict.fromkeys(ref.reference("llama").tensors, name)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))

    shutil.copy(source / "model.safetensors", source / "model-00001-of-00001.safetensors")
    name_in_index("model-00001-of-00001.safetensors")
    assert "remove either that file, or the index" in refused(source)
    name_in_index("model.safetensors")
    load_checkpoint(source)


def test_links_out_of_the_directory_are_refused_but_not_those_of_the_hub_cache(tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.move(source / "model.safetensors", elsewhere)
    (source / "model.safetensors").symlink_to(elsewhere)
    assert "outside the model's directory" in refused(source)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.move(elsewhere, blobs / "123")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    shutil.copy(source / "config.json", snapshot)
    load_checkpoint(snapshot)


def test_a_language_model_is_no_reward_model_unless_told_to_become_one(tmp_path):
    source = ref.checkpoint(tmp_path, "llama")
    assert "has no scalar head" in refused(source, head="score")
    drawn = load_checkpoint(source, head="score", key=jax.random.key(0))
    assert drawn.drawn == ("score",)
    two = ref.reference("llama").tensors | {"score.weight": np.ones((2, 32), np.float32)}
    assert "one output, [1, 32]" in refused(ref.write(tmp_path / "two", ref.reference("llama").config, two), head="score")


def test_the_table_of_families():
    text = hf.describe_families()
    assert all(re.search(rf"^{name} ", text, re.M) for name in hf.FAMILIES)
    assert abs(hf.known_sizes()["meta-llama/Meta-Llama-3-8B"] / 8.03e9 - 1) < 0.001
