"""One algorithm a file, pure functions; these two dictionaries are all that the loops and the command line know of them."""

from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.algorithms.training import Algorithm, Offline

ALGORITHMS = {"ppo": ppo.build}  # online: settings -> Algorithm
OFFLINE = {"sft": sft.build, "reward": reward_model.build}  # offline: settings -> Offline

__all__ = ["ALGORITHMS", "OFFLINE", "Algorithm", "Offline"]
