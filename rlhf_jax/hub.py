"""Where a model's files are: a local directory, or what the hub keeps under a name like org/model."""

import os
import re
from pathlib import Path

from rlhf_jax.errors import UserError


def is_name(path: str | os.PathLike[str]) -> bool:
    """It names no local directory, and may name a model of the hub: org/model."""
    directory = Path(path).expanduser()
    return not directory.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and not directory.parent.is_dir()


def find(path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The directory of a model: a local one, or a hub name fetched by huggingface_hub where that is installed; its name is
    then the commit's.

    weights: False fetches the small files alone.
    Raises:
        UserError: there is no such directory, and no hub to ask.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if not is_name(path):
        raise UserError(f"{path}: no such directory; give a directory in Hugging Face layout or a hub name like org/model")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError(f"{path}: no such directory; to fetch it from the hub, install huggingface_hub") from None
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise UserError(
            f"{path}: no such directory, and the hub cannot be read ({type(error).__name__}); download it first"
        ) from None
