"""RLHF for JAX: fine-tuning, reward models and PPO as pure functions over sharded pytrees.

Read `types.py`, then `algorithms/ppo.py`, then `online.py`.
"""

__version__ = "0.1.0"
