"""The directories in which checkpoints lie: which are ours, which are finished, what may be renamed or removed.

30           finished             30.partial    being written, or left over from a kill
30.broken    damaged, set aside   30.deleting   being removed, or left over from a kill
30.replaced  another one of the same step is being written; it comes back where that is not finished
30.part1     of a run of several processes: hashes of what process 1 wrote, until process 0 has taken them over. It lies beside
             the directory, which process 0 lists, hashes and renames while the others may still be writing theirs.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

FORMAT = 1
MARKER = "rlhf_jax_checkpoint"  # a directory without this file is never renamed or deleted by us
MARKER_TEXT = "A checkpoint of rlhf_jax. Directories without this file are never renamed or deleted by it.\n"
DESCRIPTION = "checkpoint.json"
_STATE = ("state", "state.orbax-checkpoint-tmp")
PARTIAL, RETIRED, BROKEN, REPLACED = ".partial", ".deleting", ".broken", ".replaced"


def finished(directory: Path) -> Iterator[tuple[int, Path]]:
    """Step and place of the finished checkpoints, unverified, in no order; links and what is not ours are passed over."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.isdecimal() and str(int(path.name)) == path.name and not path.is_symlink() and (path / MARKER).is_file():
            yield int(path.name), path


def leftovers(directory: Path) -> list[Path]:
    """What interrupted saves and deletions left behind."""
    return sorted(path for path in directory.iterdir() if path.suffix in (PARTIAL, RETIRED) and path.stem.isdecimal())


def settle_replaced(directory: Path) -> None:
    """Remove what was replaced, or put it back where a kill came before what was to replace it."""
    for path in directory.glob(f"*{REPLACED}"):
        if path.with_suffix("").exists():
            delete(path)
        elif path.stem.isdecimal() and (path / MARKER).is_file():
            path.rename(path.with_suffix(""))


def delete(path: Path) -> bool:
    """Remove a directory that carries our marker (the marker goes last), or holds at most Orbax's directory; nothing else.

    The latter is what threads of a save that failed put back when it was removed already.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if (path / MARKER).is_file():
        for entry in path.iterdir():
            if entry.name == MARKER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (path / MARKER).unlink()
    else:
        entries = list(path.iterdir())
        if any(entry.name not in _STATE or entry.is_symlink() or not entry.is_dir() for entry in entries):
            return False
        for entry in entries:
            shutil.rmtree(entry)
    path.rmdir()
    return True


def part(directory: Path, step: int, process: int) -> Path:
    """Where a process leaves the hashes of its files for process 0."""
    return directory / f"{step}.part{process}"


def delete_parts(directory: Path) -> None:
    """Remove what a save that was interrupted left there: it would be taken for that of the next."""
    for path in directory.glob("*.part*"):
        step, _, process = path.name.removesuffix(PARTIAL).partition(".part")
        if step.isdecimal() and process.isdecimal() and path.is_file():
            path.unlink()


def free_name(path: Path, suffix: str) -> Path:
    """`30.broken`, or `30-2.broken` where that is taken."""
    names = [path.with_name(path.name + suffix), *(path.with_name(f"{path.name}-{n}{suffix}") for n in range(2, 1000))]
    return next(name for name in names if not name.exists())


def size_text(size: float) -> str:
    """Bytes as 12.30 GB or 0.45 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
