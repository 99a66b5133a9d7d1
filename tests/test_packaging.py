"""The architecture, read from the imports; what is installed, read from pyproject.toml and the constraints."""

import ast
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_jax import config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Rooms by floor. A room may import its own floor and those named in MAY_KNOW; a new room is added here and to CONTRIBUTING.md.
FLOORS = {
    "facts": {"types", "config", "errors", "hub", "model_keys"},
    "arithmetic": {"ops", "packed"},
    "algorithms": {"algorithms"},
    "models": {"models"},
    "decoding": {"sampling", "scoring", "continuous", "warp"},
    "data": {"data"},
    "rewards": {"rewards"},
    "placement": {"parallel"},
    "survival": {"checkpoint", "integrity", "leaves", "processes", "rundir", "signals", "health", "runs", "shelf"},
    "seeing": {"metrics", "progress", "profiling", "stopwatch", "trackers", "report", "estimates"},
    "reading": {"config_file", "config_table", "checks", "strict_yaml", "environment"},
    "machines": {"topologies", "hlo", "doctor"},
    "testing": {"testing"},
    "assembly": {
        "build",
        "programs",
        "setups",
        "session",
        "fit",
        "generate",
        "export",
        "streaming",
        "scorer",
        "chat",
        "serving",
        "evaluate",
        "functional",
    },
    "loops": {"online", "offline", "quickstart"},
    "commands": {"cli", "__main__"},
}
PURE = ("facts", "arithmetic")
SERVICES = ("data", "rewards", "placement", "survival", "seeing", "reading")
MAY_KNOW = {
    "facts": (),
    "arithmetic": ("facts",),
    "algorithms": PURE,
    "models": PURE,
    "decoding": PURE,
    **dict.fromkeys(SERVICES, ("facts",)),
    "machines": ("facts",),
    "testing": (*PURE, "models", "placement"),
    "assembly": (*PURE, *SERVICES, "algorithms", "models", "decoding", "machines"),
    "loops": (*PURE, *SERVICES, "algorithms", "models", "decoding", "machines", "assembly"),
    "commands": tuple(FLOORS),
}
WITHOUT_JAX = (
    "cli",
    "cli_models",
    "config",
    "config_file",
    "config_table",
    "checks",
    "strict_yaml",
    "environment",
    "errors",
    "topologies",
)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """The full names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        yield from imported(node)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(name: str) -> str:
    for wanted in (name, name.partition("_")[0]):  # report_sections is a part of report
        for floor, rooms in FLOORS.items():
            if wanted in rooms:
                return floor
    pytest.fail(f"the room {name} has no floor: add it to FLOORS here and to the table in CONTRIBUTING.md")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_know_only_what_they_may(path):
    name = room(path)
    if name == "__init__":
        return
    floor = floor_of(name)
    known = {full.split(".")[1] for full in imports(path) if full.startswith("rlhf_jax.")} - {"__version__"}
    strangers = {other for other in known if floor_of(other) != floor and floor_of(other) not in MAY_KNOW[floor]}
    assert strangers == set(), f"{name} is on the floor {floor}, which may import {MAY_KNOW[floor]}"


def test_relative_imports_are_not_used():
    relative = [path.name for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []


TRUNK = {"ppo", "training", "update", "critic_free"}  # the last: what GRPO, RLOO, ReMax, REINFORCE++ share


def test_algorithms_know_no_sibling_but_the_trunk():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        siblings = {full.split(".")[2] for full in imports(path) if full.startswith("rlhf_jax.algorithms.")}
        allowed = TRUNK | {"deepspeed_chat"} if path.stem == "ppo" else TRUNK
        assert path.stem == "__init__" or siblings <= allowed, path.name


def test_contributing_says_where_every_module_belongs():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert [name for name in sorted(rooms) if (PACKAGE / name).suffix in ("", ".py") and f"`{name}`" not in table] == []


def test_one_place_jits():
    for path in FILES:
        names = set(imports(path)) | {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        jitting = names & {"jax.jit", "jax.pjit", "jax.pmap", "jax.experimental.pjit", "jax.experimental.pjit.pjit"}
        assert not jitting or path.name == "parallel.py", f"{path.name}: {jitting}"


def python(code: str) -> str:
    """What a fresh process prints, with the project on its path and no accelerator."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_a_run_file_imports_no_jax():
    names = ", ".join(f"rlhf_jax.{name}" for name in WITHOUT_JAX)
    heavy = python(
        f"import sys, {names}; print(*sorted({{'jax', 'transformers', 'numpy', 'torch', 'pydantic'}} & set(sys.modules)))"
    )
    assert heavy.split() == []


def test_no_module_runs_jax_when_imported():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    code = f"""
import importlib
for name in {[name for name in modules if not name.endswith("__main__")]}:
    importlib.import_module(name)
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert python(code).strip() == "False"


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
RUNNING = {"eval", "exec", "compile", "__import__"}


def dangers(module: ast.Module) -> Iterator[str]:
    """What could run something that was only meant to be read: pickles, eval, a shell, YAML with tags, code of a model's own."""
    for node in ast.walk(module):
        yield from (name for name in imported(node) if name.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in RUNNING:
            yield node.func.id
        keywords = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
        yield from (key for key in ("shell", "allow_pickle", "trust_remote_code") if keywords.get(key))
        name = ast.unparse(node.func)
        if name in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield name


def test_nothing_that_is_read_is_run():
    assert list(dangers(ast.parse("import pickle, os\nos.system('x'); eval(a); f(shell=True); yaml.load(b)"))) == [
        *("pickle", "os.system", "eval", "shell", "yaml.load")
    ]
    found = {str(path.relative_to(ROOT)): list(dangers(tree(path))) for path in (*FILES, *(ROOT / "scripts").glob("*.py"))}
    found = {path: names for path, names in found.items() if names}
    assert found == {}  # peers of the benchmark run in scripts/peers, in environments of their own


def names_read(module: ast.Module) -> Iterator[str]:
    """Attributes, and the names in getattr(..., "name", ...)."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def test_every_key_of_the_configuration_is_read():
    readers = [path for path in FILES if room(path) not in ("config", "checks", "config_file", "config_table")]
    names = {name for path in readers for name in names_read(tree(path))}
    classes = [cls for cls in vars(config).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
    fields = {(cls.__name__, field.name) for cls in classes for field in dataclasses.fields(cls)}
    algorithms = config.STAGES.keys()  # the group of an algorithm is read by the name of its stage
    assert {f"{cls}.{name}" for cls, name in fields if name not in names and name not in algorithms} == set()


# What is installed

IMPORT_NAMES = {"yaml": "pyyaml", "orbax": "orbax-checkpoint", "mlflow": "mlflow-skinny", "tensorboardx": "tensorboardx"}
INDIRECT = {"pydantic", "safetensors"}  # what typer and transformers check our options and write our tensors with


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def third_party(nodes: Iterator[ast.AST]) -> set[str]:
    tops = {full.split(".")[0] for node in nodes for full in imported(node)} - {"rlhf_jax"}
    return {IMPORT_NAMES.get(top.lower(), normal(top)) for top in tops if top not in sys.stdlib_module_names}


def at_import(module: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when a module is imported."""
    todo: list[ast.AST] = [module]
    while todo:
        node = todo.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            todo.extend(ast.iter_child_nodes(node))


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    hard = names_of(PROJECT["dependencies"])
    extras = names_of([line for lines in PROJECT["optional-dependencies"].values() for line in lines])
    always = set().union(*(third_party(at_import(tree(path))) for path in FILES))
    anywhere = set().union(*(third_party(ast.walk(tree(path))) for path in FILES))
    assert always <= hard
    assert anywhere <= hard | extras
    assert hard <= anywhere | INDIRECT
    assert hard & {"torch", "tensorflow", "datasets", "wandb", "ray", "grain", "vllm", "matplotlib"} == set()


def test_the_extra_that_a_message_names_brings_what_is_missing():
    sources = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "data").glob("*.py"))
    asked = {name.partition(".")[0] for name in re.findall(r'\bextra\("([\w.]+)"', sources)}
    assert asked == {"datasets", "pyarrow", "zstandard"}
    assert asked <= names_of(PROJECT["optional-dependencies"]["data"])


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-dev.txt"])
def test_constraints_pin_everything_with_hashes_and_no_addresses(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    entries = [entry.replace("\\\n", " ") for entry in re.split(r"\n(?=\w)", text) if not entry.startswith("#")]
    for entry in entries:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.!+]+( ; .+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*$", entry), entry[:80]
    pinned = names_of(entries)
    wanted = names_of(PROJECT["dependencies"] + (PROJECT["optional-dependencies"]["dev"] if "dev" in file else []))
    assert wanted | {"setuptools"} <= pinned
    assert "torch" not in pinned
    assert re.search(r"://|(?<!\w)/\w", text) is None


def test_what_tests_holds_what_runs_in_the_same_versions():
    def pins(file):
        return set(re.findall(r"^[\w.-]+==[^\s\\]+", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))

    assert len(pins("constraints.txt")) > 50
    assert pins("constraints.txt") <= pins("constraints-dev.txt")


def test_core_is_small():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for version in ("<", ">="):
        other = {"<": ">=", ">=": "<"}[version]
        lines = re.findall(r"^[\w.-]+==.*", text, re.MULTILINE)
        here = [line for line in lines if f"python_full_version {other} '3.12'" not in line and "== 'emscripten'" not in line]
        assert len(here) - 1 <= 60  # setuptools installs the project; it is no dependency of it


@pytest.mark.parametrize("path", [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci/run"], ids=lambda path: path.name)
def test_scripts_parse(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
    assert path.name == "venv.sh" or path.stat().st_mode & 0o111


def test_tracked_files_name_no_machine_and_no_registry():
    words = ["py" + "pi.org", "python" + "hosted.org", "deb" + "ian.org", "registry.np" + "mjs", "/wo" + "rk/", "/opt/py" + "pi"]
    pattern = "|".join(re.escape(word) for word in words)
    done = subprocess.run(["git", "grep", "-nIE", pattern], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "" or done.returncode > 1  # > 1: not a git checkout


def test_the_package_is_installed_as_it_stands():
    spec = importlib.util.find_spec("rlhf_jax")
    assert spec is not None
    assert spec.origin == str(PACKAGE / "__init__.py")
