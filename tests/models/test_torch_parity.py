"""What we write, transformers loads: the same logits and scores. What transformers writes, we load. Needs the torch extra."""

import copy
import inspect
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
import variants as cases

from rlhf_jax import config, parallel, programs, scoring
from rlhf_jax.algorithms import reward_model
from rlhf_jax.models import load_checkpoint, make_model, roles, save_checkpoint, spec_of
from rlhf_jax.types import Calibration, Frozen, Preferences, Rollout, Sequences

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers, about themselves


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with torch.no_grad(), warnings.catch_warnings():
        yield


def theirs(auto, directory, ids, mask, *, eager=True):
    """Logits of transformers, float32; at padding undefined."""
    model = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager" if eager else "sdpa").eval()
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    extra = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    return model(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int)), use_cache=False, **extra
    ).logits.numpy()


@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("name", cases.VARIANTS)
def test_transformers_loads_what_we_save(name, spelling, tmp_path):
    """From a config in version 5's spelling, and from one that has version 4's keys only."""
    found = load_checkpoint(ref.checkpoint(tmp_path, name))
    out = save_checkpoint(tmp_path / "out", found.spec, found.params)
    if spelling == "old":
        config = json.loads((out / "config.json").read_text())
        for key in ("rope_parameters", "dtype"):
            config.pop(key, None)
        (out / "config.json").write_text(json.dumps(config))
    ids, mask = ref.tokens("rows")
    logits = theirs(transformers.AutoModelForCausalLM, out, ids, mask, eager=cases.EAGER[name])
    columns = logits[..., :: cases.VOCAB // 20]
    np.testing.assert_allclose(columns[mask], ref.reference(name).outputs["columns"][mask], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", cases.TWO_ROPES)
def test_of_two_ropes_we_take_the_one_that_transformers_takes(name, tmp_path):
    """As the file stands, and as it is after an export."""
    source = ref.checkpoint(tmp_path, name)
    config = ref.reference(name).config | {"rope_scaling": cases.TWO_ROPES[name]}
    (source / "config.json").write_text(json.dumps(config))
    found = load_checkpoint(source)
    for directory in (source, save_checkpoint(tmp_path / "out", found.spec, found.params)):
        assert spec_of(transformers.AutoConfig.from_pretrained(directory).to_dict()) == found.spec


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "gpt_neox", "gemma3_text", "opt_350m", "falcon_40b", "phi3"])
def test_transformers_loads_our_reward_models_and_critics(name, tmp_path):
    found = load_checkpoint(ref.checkpoint(tmp_path, name))
    model = make_model(found.spec)
    ids, mask = ref.tokens("rows")
    states = jax.jit(model.hidden, compiler_options=ref.FAST)(found.params, ids, mask)
    reward = roles.reward_model(found.spec, found.params, jax.random.key(0))
    out = save_checkpoint(tmp_path / "reward", found.spec, reward, head="score", calibration=Calibration(0.3, 1.7))
    scores = theirs(transformers.AutoModelForSequenceClassification, out, ids, mask)
    np.testing.assert_allclose(scores[:, 0], model.score(reward, states)[:, -1], atol=1e-4, rtol=0)
    critic = roles.critic(found.spec, reward, Calibration(0.3, 1.7))
    out = save_checkpoint(tmp_path / "critic", found.spec, critic, head="value")
    if "TokenClassification" in json.loads((out / "config.json").read_text())["architectures"][0]:
        values = theirs(transformers.AutoModelForTokenClassification, out, ids, mask)[..., 0]
        np.testing.assert_allclose(values[mask], np.asarray(model.score(critic, states))[mask], atol=1e-4, rtol=0)


def test_reward_models_whose_padding_token_ends_answers(tmp_path):
    """A score of ours is transformers' of the same directory: of one that was made elsewhere, and of one that we write."""
    found = load_checkpoint(ref.checkpoint(tmp_path, "gpt2"))
    model, text = make_model(found.spec), [5, 9, 40, 2, 17, 2]
    params = roles.reward_model(found.spec, found.params, jax.random.key(0))
    shown = {
        "tokens": jnp.asarray([text]),
        "mask": jnp.ones((1, 6), bool),
        "action_mask": jnp.ones((1, 4), bool),
        "finished": jnp.ones(1, bool),
        "logprobs": jnp.zeros((1, 4)),
        "index": jnp.zeros(1, jnp.int32),
    }
    states = model.hidden(params, shown["tokens"], shown["mask"])
    made, written = (tmp_path / "made", Calibration(pad_id=2), -2), (tmp_path / "written", None, -1)
    for directory, calibration, place in (made, written):
        source = ref.write(tmp_path / "lm", ref.reference("gpt2").config | {"pad_token_id": 2}, ref.reference("gpt2").tensors)
        spec = load_checkpoint(source).spec
        save_checkpoint(directory, spec, params, head="score", calibration=calibration)
        loaded = load_checkpoint(directory, head="score")
        ours = scoring.make_reward_scorer(model, loaded.calibration)(loaded.params, Rollout(**shown))
        auto = transformers.AutoModelForSequenceClassification
        assert abs(float(model.score(params, states)[0, place] - ours[0])) < 1e-5
        assert abs(theirs(auto, directory, np.asarray([text]), np.ones((1, 6), bool))[0, 0] - float(ours[0])) < 1e-4


@pytest.mark.parametrize("name", ["opt_350m", "llama"])
def test_the_reward_stage_has_the_loss_of_deepspeed_chat_at_padding_too(name, tmp_path):
    """Its loss of pairs of unequal length, on what transformers' network says of every position, padding included."""
    directory = ref.checkpoint(tmp_path, name, head="score")
    found = load_checkpoint(directory, head="score")
    ids = np.random.default_rng(0).integers(3, 40, (4, 9)).astype(np.int32)
    ids[2:, :3] = ids[:2, :3]  # the prompts
    lengths = np.asarray([5, 9, 9, 6])  # two chosen answers, two rejected ones
    mask = np.arange(9) < lengths[:, None]
    ids = np.where(mask, ids, 1)
    network = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    states = network(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int)), use_cache=False)[0]
    scores = states @ torch.tensor(ref.score_weight(name, states.shape[-1])[0])
    wanted = -torch.nn.functional.logsigmoid(scores[:2, 3:] - scores[2:, 3:]).mean()

    chosen, rejected = (
        Sequences(tokens=jnp.asarray(ids[part]), mask=jnp.asarray(mask[part]), target_mask=jnp.asarray(mask[part]))
        for part in (slice(2), slice(2, 4))
    )
    settings = config.RewardModelLoss(loss="deepspeed_chat")
    run = SimpleNamespace(model=config.Model(), micro_batches=1, reward_model=settings)
    mesh, tx = parallel.make_mesh(config.Mesh(), jax.devices()[:1]), optax.sgd(1.0)
    shapes = jax.tree.map(lambda x: programs.abstract(x.shape, x.dtype, parallel.replicated(mesh)), found.params)
    state = programs.abstract_offline_state(mesh, tx, shapes)
    do = programs.offline_programs("reward", run, reward_model.build(settings), make_model(found.spec), tx, state, Frozen())
    got, _ = do["evaluate"].compile()(found.params, Frozen(), Preferences(chosen=chosen, rejected=rejected))
    np.testing.assert_allclose(got["reward_model/loss"], wanted, rtol=1e-5)


# Widths are multiples of 4: torch's grouped product of a mixture's experts wants rows of whole 16 bytes.
SHAPES = [(1, 1, 8, 12), (6, 3, 10, 36), (8, 2, 4, 40), (5, 1, 6, 24), (4, 4, 14, 32)]  # heads, kv heads, head_dim, width


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "width"), SHAPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "mixtral"])
def test_other_shapes_that_transformers_writes(model_type, heads, kv_heads, head_dim, width, tmp_path):
    if width % heads and model_type in ("llama", "gemma2", "gemma3_text"):
        width = heads * head_dim  # their classes insist
    settings = cases.llama_like(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=width)
    settings |= {"sliding_window": 5, "num_hidden_layers": 3, "tie_word_embeddings": heads % 2 == 0}
    settings |= {"num_local_experts": 3, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    settings |= {"attn_logit_softcapping": 3.0} if model_type == "gemma3_text" else {}  # which its class ignores
    torch.manual_seed(heads)
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(settings))
    theirs_model = transformers.AutoModelForCausalLM.from_config(config)
    for p in theirs_model.parameters():
        p.copy_(p + 0.2 * torch.randn_like(p))
    theirs_model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    found = load_checkpoint(tmp_path / "theirs")
    model = make_model(found.spec)
    ids, mask = ref.tokens("rows")
    logits = jax.jit(lambda p: model.logits(p, model.hidden(p, ids, mask)), compiler_options=ref.FAST)(found.params)
    expected = theirs(transformers.AutoModelForCausalLM, tmp_path / "theirs", ids, mask)
    atol = 2e-4 if model_type == "mixtral" else 1e-4
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=atol, rtol=0)


def test_bfloat16_returns_the_bits_through_transformers(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen2", **cases.VARIANTS["qwen2"][1])
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    found = load_checkpoint(tmp_path / "theirs", param_dtype=jnp.float32)
    out = save_checkpoint(tmp_path / "ours", found.spec, found.params)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    ours, original = again.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], original[name]) for name in original)
