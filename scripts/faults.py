"""Runs the fault matrix and prints its rows: python scripts/faults.py [--kills] [--figures] [--stages sft,ppo] [--devices 1,8]

Without options: every row's tests. --kills, first: each stage is killed at thirty places and resumed after each, on 1 and on 8
simulated devices, and asked to stop at twenty random moments; about 20 minutes on one core. --figures: what a manifest costs,
equal bytes on other devices, 1,000 updates with something that is not finite. Exit status 1 when anything failed.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults import figures, kills
from tests.faults.matrix import ROWS

ENDS = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")


def run_kills(stages: list[str], devices: list[int], timed: int) -> bool:
    """Every chain; prints a line a kill and a table."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf_jax_faults_"))
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {text}", flush=True)

    configs, table, good = kills.prepare(folder), [], True
    for count in devices:
        for stage in stages:
            points = list(kills.points(stage, timed, seed=count))
            result = kills.chain(configs[stage], stage, devices=count, kill_points=points, say=say)
            good &= result.end_is_equal and result.resumed_exactly == len(points)
            table.append((stage, count, len(points), result))
    print("\nstage    devices  kill points  killed  resumed exactly  end equal")
    for stage, count, asked, result in table:
        print(f"{stage:8} {count:7}  {asked:11}  {result.killed:6}  {result.resumed_exactly:15}  {result.end_is_equal}")
        for note in result.notes:
            print(f"    {note}")
    whole = [(result.resumed_exactly, asked) for _, _, asked, result in table]
    print(f"{sum(n for n, _ in whole)}/{sum(n for _, n in whole)} kills resumed to the state of the run that nobody touched")
    for stage in stages:
        asked, notes = kills.stops(configs[stage], stage, devices=devices[0], times=20, say=say)
        print(f"\n{stage} on {devices[0]}: SIGTERM at a random moment: {asked}/20 with nothing lost and exit status 143")
        for note in notes:
            print(f"    {note}")
        good &= not notes
    shutil.rmtree(folder)
    return good


def run_figures() -> bool:
    """Each with its bound."""
    folder, good = Path(tempfile.mkdtemp(prefix="rlhf_jax_figures_")), True
    cost = figures.manifest_cost(folder / "cost", 200, 9)
    part = f"{cost.manifest_s * 1e3:.0f} of {cost.save_s * 1e3:.0f} ms for {cost.megabytes:.0f} MB"
    print(f"manifest: {part}, {cost.share:.1%} of a save (at most 5 %)")
    print(f"verifying before a restore: {cost.verify_s * 1e3:.0f} ms", flush=True)
    good &= cost.share <= 0.05
    for writers, readers in ((1, 8), (8, 2), (8, 1)):
        equal = figures.resharded(folder, writers, readers)
        print(f"written on {writers} devices, restored on {readers}: {'equal bytes' if equal else 'DIFFERENT'}", flush=True)
        good &= equal
    setup = figures.ppo_setup(folder)
    found = figures.inject(setup, 1000)
    print(f"updates with something not finite in them: {found.applied} of 1000 reached the state ({found.skipped} skipped, "
          f"{found.dropped} went on without the ill rows)")  # fmt: skip
    shutil.rmtree(folder)
    return good and not found.applied


def run_rows() -> bool:
    """Every row's tests in one pytest; prints the table."""
    wanted = sorted({test for _, tests in ROWS.values() for test in tests})
    words = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", *wanted]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        output = []
        for line in process.stdout or ():
            output.append(line)
            if not line.startswith("PASSED "):
                print(line, end="")
    outcomes = [line.split(" - ")[0].split(maxsplit=1) for line in output]
    outcomes = [(words[1].strip(), words[0] == "PASSED") for words in outcomes if words and words[0] in ENDS and len(words) == 2]
    passed = 0
    print("\nrow  result  fault")
    for row, (fault, tests) in ROWS.items():
        states = [good for test in tests for name, good in outcomes if name == test or name.startswith(f"{test}[")]
        good = all(states) and all(any(name.startswith(test) for name, _ in outcomes) for test in tests)
        passed += good
        print(f"{row:3}  {'passed' if good else 'FAILED'}  {fault}  ({sum(states)}/{len(states)} tests)")
    print(f"\n{passed}/{len(ROWS)} rows passed")
    return passed == len(ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", action="store_true", help="the long part too")
    parser.add_argument("--only-kills", action="store_true", help="the long part alone")
    parser.add_argument("--figures", action="store_true", help="the figures alone")
    parser.add_argument("--stages", default="sft,reward,ppo")
    parser.add_argument("--devices", default="1,8")
    parser.add_argument("--timed", type=int, default=4, help="kills at a random moment, per chain")
    asked = parser.parse_args()
    good = True
    if asked.figures:
        sys.exit(not run_figures())
    if asked.kills or asked.only_kills:
        good &= run_kills(asked.stages.split(","), [int(count) for count in asked.devices.split(",")], asked.timed)
    if not asked.only_kills:
        good &= run_rows()
    sys.exit(not good)


if __name__ == "__main__":
    main()
