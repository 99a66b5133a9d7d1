"""The commands: what each starts, what a mistake costs, what --help costs."""

import gc
import io
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_jax import cli, cli_models, config, config_table, environment, integrity, signals
from rlhf_jax.errors import UserError

ROOT = Path(__file__).parent.parent
RUN = "model: {path: m}\ndata: {path: d}\n"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Commands set variables for the process; a test must not leave them behind."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def run(monkeypatch, capsys):
    """run("ppo", "file.yaml") -> (exit status, standard output, standard error)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    return call


def fake(monkeypatch, module, **functions):
    monkeypatch.setitem(sys.modules, f"rlhf_jax.{module}", SimpleNamespace(**functions))


def test_help_and_mistakes_are_cheap_and_import_no_jax(tmp_path):
    (tmp_path / "bad.yaml").write_text("stepz: 1\n")
    code = """
import io, json, sys, time
from rlhf_jax import cli
for argv in (["--help"], ["ppo", "--help"], ["ppo", sys.argv[1]], ["config", "ppo", "kl"]):
    sys.argv[1:], out, err = argv, sys.stdout, sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        cli.main()
    except SystemExit as error:
        status = error.code
    text, message = sys.stdout.getvalue(), sys.stderr.getvalue()
    sys.stdout, sys.stderr = out, err
    heavy = sorted({"jax", "numpy", "transformers", "torch"} & set(sys.modules))
    print(json.dumps([status, heavy, time.process_time(), text, message]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bad.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    shown, shown_ppo, bad, keys = (json.loads(line) for line in done.stdout.splitlines())
    assert [row[0] for row in (shown, shown_ppo, bad, keys)] == [0, 0, 2, 0]
    assert [row[1] for row in (shown, shown_ppo, bad, keys)] == [[]] * 4
    assert shown[2] < 0.5, "CPU-seconds of --help"
    assert all(f"  {stage} " in shown[3] for stage in config.STAGES)
    assert all((ROOT / file).is_file() for file in re.findall(r"configs/\S+", shown[3]))
    assert bad[4] == f"rlhf-jax: {tmp_path / 'bad.yaml'}:1: unknown key 'stepz'; did you mean 'steps'?\n"
    assert "ppo.kl_coef = 0.05  (a number, reward units per nat)\n    weight of the KL penalty" in keys[3]


def test_every_stage_has_a_command():
    assert cli.TRAINING.keys() == config.STAGES.keys()


@pytest.mark.parametrize("stage", config.STAGES)
def test_training_commands_start_the_loop_with_the_configuration(stage, run, monkeypatch, tmp_path):
    started = []
    online = issubclass(config.STAGES[stage], config.OnlineRun)
    fake(monkeypatch, "online" if online else "offline", run=lambda *args, **kwargs: started.append((args, kwargs)))
    path = tmp_path / "run.yaml"
    path.write_text(RUN + ("reward: {model: r}\n" if online else ""))
    assert run(stage, path, "seed=3") == (0, "", "")
    assert run(stage, path, "--from-scratch", "--resume-override", "seed,model.path")[0] == 0
    (plain, plain_options), (_, options) = started
    assert plain[0] == stage
    assert type(plain[1]) is config.STAGES[stage]
    assert (plain[1].seed, plain[1].model.path) == (3, "m")
    assert plain_options == {"from_scratch": False, "override": []}
    assert options == {"from_scratch": True, "override": ["seed", "model.path"]}


@pytest.mark.parametrize(("chips", "platforms", "on_tpu"), [(True, "", True), (True, "cpu", False), (False, "", False)])
def test_the_hosts_of_a_slice_look_for_one_another(run, monkeypatch, tmp_path, chips, platforms, on_tpu):
    """On a TPU VM no variable names the other hosts: `processes.start` asks the machine's metadata."""
    calls = []
    fake(monkeypatch, "processes", start=lambda **options: calls.append(options))
    monkeypatch.setattr(environment, "has_tpu", lambda: chips)
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", platforms)
    fake(monkeypatch, "offline", run=lambda *args, **kwargs: calls.append(args[1].log.profile_step))
    (tmp_path / "run.yaml").write_text(RUN)
    assert run("sft", tmp_path / "run.yaml", "--profile", "3") == (0, "", "")
    assert calls == [{"on_tpu": on_tpu}, 3]


def test_what_a_terminal_cannot_show_is_written_as_json_writes_it(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    fake(monkeypatch, "runs", describe=lambda directory: ('"é 漢 😀"', True))
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", "runs", "somewhere"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert (exit_info.value.code, json.loads(out.buffer.getvalue().decode("latin-1"))) == (0, "é 漢 😀")


def test_a_run_that_was_asked_to_stop_says_how_to_go_on(run, monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise signals.Stopped("saved at step 3; go on with: rlhf-jax sft run.yaml")

    fake(monkeypatch, "offline", run=stop)
    (tmp_path / "run.yaml").write_text(RUN)
    assert run("sft", tmp_path / "run.yaml") == (143, "", "saved at step 3; go on with: rlhf-jax sft run.yaml\n")


def test_quickstart_passes_its_options(run, monkeypatch):
    calls = []
    fake(monkeypatch, "quickstart", run=lambda **kwargs: calls.append(kwargs) or "three numbers")
    assert run("quickstart") == (0, "three numbers\n", "")
    assert run("quickstart", "--out", "a", "--task", "addition", "--seed", "2")[0] == 0
    assert run("quickstart", "--demo", "overoptimization")[0] == 0
    assert calls == [
        {"out": Path("runs/quickstart"), "demo": None, "task": "reviews", "seed": 0},
        {"out": Path("a"), "demo": None, "task": "addition", "seed": 2},
        {"out": Path("runs/quickstart"), "demo": "overoptimization", "task": "reviews", "seed": 0},
    ]
    assert run("quickstart", "--demo", "overoptimization", "--task", "addition")[0] == 2
    assert run("quickstart", "--task", "reviewz")[0] == 2


@pytest.mark.parametrize("command", ["quickstart", "generate", "chat", "evaluate"])
def test_a_seed_is_one_that_keys_are_made_of(run, command):
    """Beyond 32 bits other seeds would give equal answers, beyond 64 a traceback."""
    words = {"quickstart": [], "chat": ["m"]}.get(command, ["m", "--prompts", "p.txt"])
    status, _, message = run(command, *words, "--seed", 2**31)
    assert status == 2
    assert re.search(r"--seed.*2147483647", message)


def test_mistake_while_running_is_one_message_and_status_2(run, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise UserError("data.jsonl:7: no column prompt")

    fake(monkeypatch, "offline", run=fail)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert run("sft", path) == (2, "", "rlhf-jax: data.jsonl:7: no column prompt\n")


def test_a_report_is_of_runs(run, tmp_path):
    """Also where one of several is mistyped: then nothing is written."""
    (tmp_path / "no-run").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    status, _, error = run("report", tmp_path / "run", tmp_path / "no-run", "--out", tmp_path / "both.html")
    assert (status, error.startswith(f"rlhf-jax: {tmp_path / 'no-run'}: no metrics.jsonl in it")) == (2, True)
    assert not (tmp_path / "both.html").exists()


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path, error):
    def fail(*args, **kwargs):
        raise error

    fake(monkeypatch, "offline", run=fail)
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", "sft", str(tmp_path / "run.yaml")])
    with pytest.raises(error):
        cli.main()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ppo", "missing.yaml"], "missing.yaml: there is no such file"),
        (["pp"], "Did you mean 'ppo'?"),
        (["ppo"], "Missing argument 'CONFIG'"),
        (["config", "pp"], "the stage 'pp' is not one of sft, reward, ppo"),
        (["config", "ppo", "zebra"], "no key of ppo has to do with 'zebra'"),
        (["config"], "name a stage, such as `rlhf-jax config ppo`: sft, reward"),
        (["generate", "model"], "Missing option '--prompts'"),
    ],
)
def test_wrong_command_lines(run, args, message):
    status, out, err = run(*args)
    assert status == 2
    assert message in err
    assert out == ""


def test_config_prints_a_run_file_and_the_page(run):
    for stage, cls in config.STAGES.items():
        assert run("config", stage, "--yaml")[1] == config_table.dump(cls())
    assert run("config", "--markdown", "ppo")[1] == config_table.markdown()
    rows = run("config", "ppo")[1].splitlines()[::2]
    assert len(rows) == len(list(config_table.describe(config.PPORun)))


def test_fit_says_by_its_status_whether_it_fits(run, monkeypatch, tmp_path):
    verdict = SimpleNamespace(fits=False)
    fake(monkeypatch, "fit", fit=lambda stage, run, machine, only: verdict)
    fake(monkeypatch, "fit_table", to_text=lambda v: "table", to_json=lambda v: "{}")
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert run("fit", path, "--topology", "v5e-8", "--stage", "sft") == (1, "table\n", "")
    verdict.fits = True
    path.write_text(RUN + "reward_model: {}\n")
    assert run("fit", path, "--topology", "v5e-8", "--json") == (0, "{}\n", "")
    assert run("fit", path, "--topology", "abacus")[0] == 2


def test_models_data_and_report(run, monkeypatch, tmp_path):
    families = run("models")[1]
    assert re.search(r"^llama +\S", families, re.MULTILINE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    (tmp_path / "run.yaml").write_text(
        f"model: {{scratch: {{vocabulary: 300}}}}\ndata: {{path: {tmp_path}/rows.jsonl}}\nbatch_size: 4\n"
    )
    _, told, aside = run("data", tmp_path / "run.yaml")
    assert "40 rows" in told
    assert re.fullmatch(
        r"rlhf-jax: .*run\.yaml: taken for a run of sft; reward, ppo, .* have .*: say which with --stage\n", aside
    )
    assert run("data", tmp_path / "run.yaml", "--stage", "sft") == (0, told, "")
    calls = []
    fake(monkeypatch, "report", check_run_dirs=list, write_report=lambda runs, out: calls.append((runs, out)) or out)
    assert run("report", "a")[1] == "a/report.html\n"
    assert run("report", "a", "b")[1] == "report.html\n"
    assert run("report", "a", "b", "--out", "c.html")[1] == "c.html\n"
    assert calls[2] == ([Path("a"), Path("b")], Path("c.html"))


def test_runs_lists_and_verifies(run, tmp_path):
    for name, done in (("one", 20), ("two", None)):
        saved = tmp_path / name / "checkpoints/20"
        saved.mkdir(parents=True)
        (saved / "state").write_bytes(b"state")
        integrity.write_manifest(saved, 20, integrity.hash_files(saved, ["state"]))
        integrity.write_latest(saved.parent, 20)
        record = {"starts": [{"time": "2026-01-01T00:00:00Z"}], "completed_step": done}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    status, out, _ = run("runs", tmp_path)
    assert status == 0
    assert f"{tmp_path}/one: finished at step 20, begun 2026-01-01T00:00:00Z, 1 start\n  step 20: good, 0.0 MB, latest\n" in out
    assert f"{tmp_path}/two: not finished" in out
    (tmp_path / "two/checkpoints/20/state").write_bytes(b"stale")
    status, out, _ = run("runs", tmp_path / "two")
    assert status == 1
    assert "step 20: damaged" in out
    assert "checkpoints/20/state is damaged" in out
    (tmp_path / "two/checkpoints/²").mkdir()
    assert run("runs", tmp_path / "two")[0] == 1
    for damaged in ("{", '{"starts": [5], "completed_step": 7}'):
        (tmp_path / "one/run.json").write_text(damaged)
        assert run("runs", tmp_path / "one") == (1, f"{tmp_path}/one: run.json is damaged; put back a copy\n", "")
    status, _, err = run("runs", tmp_path / "three")
    assert status == 2
    assert "no run there" in err


def test_version_and_doctor(run):
    assert run("--version")[1] == "0.1.0\n"
    page = run("doctor")[1]
    assert "device:      cpu 0: cpu" in page
    assert "GiB free in" in page
    assert 'pip install "rlhf-jax[wandb]"' in page or "wandb: installed" in page


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m rlhf_jax config ppo | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("out = runs/run  (text)\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output_is_one_message(unbuffered):
    command = [sys.executable, "-m", "rlhf_jax", "config", "ppo"]
    with open("/dev/full", "w") as full:
        options = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "timeout": 60, "check": False}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, **options)
    message = "standard output, or a file: cannot be written (No space left on device); free disk space, or name another place"
    assert (done.returncode, done.stderr) == (2, f"rlhf-jax: {message}\n")


# The environment


def test_environment_sets_defaults_only(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "0", "JAX_PLATFORMS": "cpu"})
    environment.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "rlhf-jax/xla")
    assert (tmp_path / "rlhf-jax/xla").is_dir()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) == 0
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 4 * 2**30


def test_a_cache_that_was_given_keeps_its_own_limit(monkeypatch):
    """JAX writes nothing with a limit where it has written without one."""
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "JAX_PLATFORMS": "cpu"})
    environment.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) == 0
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ


@pytest.mark.parametrize(
    ("told", "threads"),
    [
        ({"XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=8"}, "128"),
        ({"JAX_NUM_CPU_DEVICES": "2"}, "32"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, None),
        ({"JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "3"}, "3"),
        ({}, None),
    ],
)
def test_simulated_devices_have_threads_to_wait_in(told, threads, monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "JAX_PLATFORMS": "cpu"} | told)
    environment.prepare()
    assert os.environ.get("PJRT_NPROC") == threads


def test_commands_collect_cycles_seldom_and_still_collect_them():
    class Node:
        pass

    def rounds(count: int) -> int:
        before = sum(generation["collections"] for generation in gc.get_stats())
        alive = [Node() for _ in range(count)]
        return sum(generation["collections"] for generation in gc.get_stats()) - before if alive else 0

    default = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        often = rounds(100_000)
        cli_models.start("errors")
        assert 0 < rounds(100_000) < often / 10
    finally:
        gc.set_threshold(*default)


FAULTS = """
import ctypes, resource, sys
from rlhf_jax import environment
kept = sys.argv[1] == "kept" and environment.keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    block = library.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    library.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_freed_is_there_for_the_next_program():
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    told = {"kept": bare, "given back": bare, "kept, but told otherwise": bare | {"MALLOC_TRIM_THRESHOLD_": "1000000"}}
    found = {}
    for name, variables in told.items():
        command = [sys.executable, "-c", FAULTS, name.split(",")[0]]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=True)
        kept, faults = done.stdout.split()
        found[name] = kept == "True", int(faults) < 100
    expected = not environment.has_tpu() and not any(Path(path).exists() for path in environment.ACCELERATORS)
    assert found == {"kept": (expected, expected), "given back": (False, False), "kept, but told otherwise": (False, False)}


LEFT_BEHIND = """
import ctypes, pathlib, sys
from rlhf_jax import environment
kept = environment.keep_freed_memory()
import jax
if sys.argv[1] == "given back":
    environment.TRIM_FROM_S = 0.0
    environment.give_back_after_compiling()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident_mb():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
jax.jit(lambda x: x - 1)(1.0)  # what a first program brings into memory is not counted
block = library.malloc(256 << 20)
ctypes.memset(block, 1, 256 << 20)
library.free(block)
before = resident_mb()
jax.jit(lambda x: x + 1)(1.0)
print(kept, before - resident_mb() > 200)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_memory_of_the_compiler_is_given_back():
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = {}
    for name in ("given back", "left"):
        command = [sys.executable, "-c", LEFT_BEHIND, name]
        done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=60, check=True)
        kept, less = done.stdout.split()
        found[name] = less == "True" if kept == "True" else name == "given back"  # nothing is kept beside an accelerator
    assert found == {"given back": True, "left": False}


def test_a_home_that_cannot_be_written_to_gets_a_temporary_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path / "file"), "JAX_PLATFORMS": "cpu"})
    environment.prepare()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).is_dir()


@pytest.mark.parametrize(
    ("library", "vendor", "device", "platforms"),
    [
        (True, "0x10de", "0x2330", "cpu"),
        (True, "0x1ae0", "0x0063", None),  # TPU v5e
        (True, "0x1ae0", "0x0042", "cpu"),  # Google's network card
        (False, "0x10de", "0x2330", None),
    ],
)
def test_the_tpu_library_is_not_asked_where_there_is_no_tpu(monkeypatch, tmp_path, library, vendor, device, platforms):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/vendor").write_text(vendor + "\n")
    (tmp_path / "0/device").write_text(device + "\n")
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    monkeypatch.setattr(environment, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: library or None if name == "libtpu" else None)
    environment.prepare()
    assert os.environ.get("JAX_PLATFORMS") == platforms
