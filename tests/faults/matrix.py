"""The fault matrix: row -> (what is injected, the tests that show what happens). `scripts/faults.py` runs and prints it."""

_RUNS = "tests/faults/test_matrix_runs.py::"
_KILLS = ("tests/faults/test_kill_resume.py::test_rows_1_to_4_a_killed_run_ends_bit_for_bit_as_one_that_was_not",)
_DAMAGE = _RUNS + "test_rows_10_to_13_a_damaged_checkpoint_is_named_and_the_one_before_is_used"

ROWS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("kill -9 in the rollout", _KILLS),
}
