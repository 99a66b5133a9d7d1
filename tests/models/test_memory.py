"""Loading holds one stored tensor beside this process's own shards, not a second model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref

# 24 layers: a model of 192 MiB in float32 whose largest tensor has 32 MiB.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MEASURE = """
import ctypes, gc, json, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rlhf_jax.models import load_checkpoint

def rss(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

mesh = Mesh(np.asarray(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
def split(shapes):
    return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*[None] * (s.ndim - 1), "x")), shapes)

load_checkpoint(sys.argv[2], shardings=split)  # imports, backend, first use
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # or the peak would reuse what the warm-up has freed
before = rss("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
found = load_checkpoint(sys.argv[1], shardings=split)
jax.block_until_ready(found.params)
own = sum(shard.data.nbytes for leaf in jax.tree.leaves(found.params) for shard in leaf.addressable_shards)
print(json.dumps({"peak": rss("VmHWM") - before, "own": own, "devices": len(jax.devices())}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc, which only Linux has")
@pytest.mark.parametrize(("devices", "stored"), [(1, np.float32), (4, np.float32), (4, np.float16)])
def test_peak_memory_of_loading(devices, stored, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (16384, 512), "model.norm.weight": (512,)}
    inner = {"self_attn.q_proj": (256, 512), "self_attn.k_proj": (64, 512), "self_attn.v_proj": (64, 512)}
    inner |= {
        "self_attn.o_proj": (512, 256),
        "mlp.gate_proj": (1024, 512),
        "mlp.up_proj": (1024, 512),
        "mlp.down_proj": (512, 1024),
    }
    inner |= {"input_layernorm": (512,), "post_attention_layernorm": (512,)}
    layers = range(CONFIG["num_hidden_layers"])
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in inner.items()}
    tensors = {n: rng.standard_normal(s, np.float32).astype(stored) for n, s in shapes.items()}
    large = ref.write(tmp_path / "large", CONFIG, tensors)
    small = {n: x for n, x in tensors.items() if "layers." not in n or "layers.0." in n}
    warm = ref.write(tmp_path / "small", CONFIG | {"num_hidden_layers": 1}, small)
    largest = max(x.nbytes for x in tensors.values())
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, script, large, warm], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert found["devices"] == devices
    beside = (found["peak"] - found["own"]) / largest
    own, peak = f"{found['own']:,}", f"{found['peak']:,}"
    sys.stdout.write(f"{devices} devices, {np.dtype(stored)}: own shards {own} B, peak {peak} B, {beside:.2f} x the largest\n")
    assert beside < 1.2, found
