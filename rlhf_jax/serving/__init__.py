"""A model behind HTTP, spoken to as OpenAI's is.

schema.py: what may be asked; service.py: what each route does; answers.py: what is said; app.py: HTTP and the server.
"""

from rlhf_jax.serving.app import serve

__all__ = ["serve"]
