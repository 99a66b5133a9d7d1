"""One algorithm a file, pure functions; these two dictionaries are all that the loops and the command line know of them."""

from rlhf_jax.algorithms import dpo, grpo, gspo, kto, ppo, reinforce_pp, remax, reward_model, rloo, sft
from rlhf_jax.algorithms.training import Algorithm, Offline

ALGORITHMS = {  # online: settings -> Algorithm
    "ppo": ppo.build,
    "grpo": grpo.build,
    "gspo": gspo.build,
    "rloo": rloo.build,
    "reinforce_pp": reinforce_pp.build,
    "remax": remax.build,
}
OFFLINE = {"sft": sft.build, "reward": reward_model.build, "dpo": dpo.build, "kto": kto.build}  # settings -> Offline

__all__ = ["ALGORITHMS", "OFFLINE", "Algorithm", "Offline"]
