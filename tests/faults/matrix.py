"""The fault matrix: row -> (what is injected, the tests that show what happens). `scripts/faults.py` runs and prints it."""

_FAULTS = "tests/faults/"
_RUNS = _FAULTS + "test_matrix_runs.py::test_"
_ONLINE = _FAULTS + "test_matrix_online.py::test_"
_INPUTS = _FAULTS + "test_matrix_inputs.py::test_"
_STOP = _FAULTS + "test_stop.py::test_"
_HTTP = "tests/rewards/test_http.py::test_"
_KILL = _FAULTS + "test_kill_resume.py::test_rows_1_to_4_a_killed_run_ends_bit_for_bit_as_one_that_was_not"
_DAMAGE = _RUNS + "rows_10_to_13_a_damaged_checkpoint_is_named_and_the_one_before_is_used"
_ASKED = _RUNS + "rows_5_and_6_a_request_to_stop_saves_the_last_finished_update"
_TWICE = _STOP + "rows_6_and_8_asked_it_saves_and_asked_twice_it_leaves_with_older_checkpoints_intact"
_KEYS = _INPUTS + "rows_27_and_28_keys_and_values_that_cannot_be_meant"
_LINES = _INPUTS + "rows_30_and_31_a_line_that_cannot_be_read_is_named_or_skipped"
_SERVER = _ONLINE + "rows_39_and_40_a_server_that_is_down_ends_the_run_within_bounds"
_EQUAL = _ONLINE + "rows_38_and_42_equal_scores_and_answers_without_an_end_raise_alarms_and_stay_finite"
_PATHS = "tests/test_integrity.py::test_names_that_leave_the_checkpoint_are_refused"

ROWS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("kill -9 in a rollout", (_KILL + "[ppo]",)),
    2: ("kill -9 in an update", (_KILL + "[ppo]",)),
    3: ("kill -9 in a save", (_KILL + "[sft]",)),
    4: (
        "kill -9 while old checkpoints are removed",
        (_KILL + "[sft]", "tests/test_checkpoint.py::test_left_overs_of_a_kill_are_removed_and_told_and_nothing_else_is"),
    ),
    5: (
        "SIGTERM in a rollout",
        (_ONLINE + "row_5_asked_in_the_middle_of_a_rollout_the_last_finished_update_is_saved", _ASKED),
    ),
    6: ("SIGTERM in an update", (_ASKED, _TWICE)),
    7: ("SIGTERM in an evaluation", (_RUNS + "row_7_a_request_to_stop_during_evaluation_is_obeyed_after_it",)),
    8: ("SIGTERM in a compilation; a second SIGTERM", (_STOP + "row_8_asked_while_it_compiles_it_leaves_at_once", _TWICE)),
    9: (
        "SIGTERM to one of two processes",
        (_FAULTS + "test_processes.py::test_row_9_one_of_two_processes_is_asked_and_both_save_the_same_step",),
    ),
    10: ("a checkpoint file truncated", (_DAMAGE + "[10 truncated]",)),
    11: (
        "a bit flipped",
        (_DAMAGE + "[11 bit flipped]", "tests/test_checkpoint.py::test_200_flips_in_a_real_checkpoint_are_all_found"),
    ),
    12: ("a checkpoint file deleted", (_DAMAGE + "[12 deleted]",)),
    13: ("a checkpoint file zeroed", (_DAMAGE + "[13 zeroed]",)),
    14: (
        "all checkpoints bad",
        (_RUNS + "row_14_when_every_checkpoint_is_damaged_the_run_stops_and_offers_to_start_anew",),
    ),
    15: (
        "disk full",
        (
            _RUNS + "row_15_too_little_disk_is_told_before_compiling",
            _RUNS + "row_15_a_disk_that_fills_up_during_a_save_keeps_the_older_checkpoint",
            _RUNS + "row_15_a_save_that_failed_stops_the_run_at_the_next_step_not_at_the_next_save",
            _FAULTS + "test_disk.py::test_row_15_a_disk_that_is_really_full_keeps_the_older_checkpoint",
        ),
    ),
    16: (
        "read-only or impossible output directory",
        (
            _RUNS + "row_16_a_place_where_nobody_may_write_fails_before_compiling",
            "tests/test_rundir.py::test_a_read_only_directory_is_refused",
        ),
    ),
    17: ("directory of another run", (_RUNS + "row_17_a_directory_of_another_run_is_refused",)),
    18: (
        "other mesh or number of devices",
        (
            _RUNS + "row_18_another_mesh_continues_and_says_that_bits_may_differ",
            "tests/test_checkpoint.py::test_another_mesh_gets_equal_bytes",
        ),
    ),
    19: (
        "edited data set, other tokenizer",
        (
            _RUNS + "row_19_an_edited_data_set_is_refused_with_both_hashes",
            "tests/test_rundir.py::test_an_input_that_was_edited_is_refused_with_both_hashes",
        ),
    ),
    20: (
        "resume at the end of an epoch and of the run",
        (
            _RUNS + "row_20_resuming_at_the_end_of_an_epoch_and_of_the_run",
            _RUNS + "row_20_a_run_killed_before_its_export_exports_when_it_is_resumed_at_the_end",
        ),
    ),
    21: (
        "two processes in one directory",
        (
            _RUNS + "row_21_a_second_process_in_the_same_directory_is_refused",
            "tests/test_rundir.py::test_a_second_process_is_refused_and_a_dead_one_is_replaced",
        ),
    ),
    22: ("truncated weights", (_INPUTS + "row_22_truncated_weights_are_named_with_their_sizes",)),
    23: ("weights as .bin", (_INPUTS + "row_23_pickles_are_refused_with_the_way_to_convert",)),
    24: ("missing, extra, wrong-shape tensor", (_INPUTS + "row_24_tensors_that_do_not_fit_are_listed",)),
    25: ("tokenizer larger than the embedding", (_INPUTS + "row_25_a_tokenizer_that_is_larger_than_the_embedding_is_refused",)),
    26: (
        "no chat template; no pad, no end-of-sequence",
        (
            _INPUTS + "row_26_messages_without_a_template_are_refused",
            "tests/data/test_tokenizer.py::test_no_pad_no_eos_and_unknown_tokens",
        ),
    ),
    27: ("unknown key, nested typo", (_KEYS,)),
    28: ("duplicate key, tab, 1e-3, 1_0, no", (_KEYS, _INPUTS + "row_28_a_float_as_people_write_it_is_one")),
    29: ("sizes that do not divide", (_INPUTS + "row_29_sizes_that_do_not_divide_are_told_with_their_arithmetic",)),
    30: ("malformed line", (_LINES,)),
    31: ("invalid UTF-8, BOM, CRLF", (_LINES, _INPUTS + "row_31_byte_order_mark_and_windows_line_ends_are_accepted")),
    32: ("missing column, wrong type", (_INPUTS + "row_32_a_missing_column_shows_those_that_are_there",)),
    33: ("empty file, too few rows", (_INPUTS + "row_33_too_few_rows_are_counted",)),
    34: (
        "long prompt, empty prompt or answer, equal pair",
        (
            "tests/data/test_batches.py::test_long_prompts_follow_the_policy",
            "tests/data/test_batches.py::test_empty_and_equal_rows_are_dropped_and_counted",
        ),
    ),
    35: (
        "emoji, CJK, NUL, lone surrogate",
        (
            "tests/data/test_tokenizer.py::test_trained_bpe_round_trips_and_repeats",
            "tests/data/test_sources.py::test_half_a_surrogate_pair_becomes_a_replacement_character",
            "tests/test_report.py::test_text_shows_what_would_act_in_silence",
        ),
    ),
    36: ("<script> in a sample", ("tests/test_report.py::test_what_models_write_is_inert",)),
    37: (
        "reward NaN, infinite, of wrong length, None, raises",
        (
            _ONLINE + "row_37_a_reward_that_fails_stops_the_run_with_everything_saved",
            _ONLINE + "row_37_a_reward_that_fails_during_an_evaluation_keeps_the_training_and_the_evaluation_is_made_up_for",
            "tests/rewards/test_rewards.py::test_what_is_no_reward_stops_the_run_and_is_never_zero",
        ),
    ),
    38: ("all rewards identical", (_EQUAL,)),
    39: ("reward server down or slow", (_SERVER, _HTTP + "a_server_that_is_down", _HTTP + "a_slow_server")),
    40: (
        "reward server: 500, garbage, endless body, redirect",
        (
            _HTTP + "retries_are_bounded_and_never_a_zero",
            _HTTP + "answers_that_are_no_scores",
            _HTTP + "a_body_that_never_ends_is_cut_off",
            _HTTP + "redirects_stay_on_the_host",
        ),
    ),
    41: ("learning rate 1e30", (_ONLINE + "row_41_updates_that_explode_are_skipped_and_the_run_stops_after_three",)),
    42: ("no answer ever ends", (_EQUAL,)),
    43: (
        "out of memory",
        (
            _RUNS + "row_43_out_of_memory_names_the_phase_and_three_keys",
            _ONLINE + "row_43_each_program_that_runs_out_of_memory_is_named",
        ),
    ),
    44: ("a hung step", (_RUNS + "row_44_a_hung_step_prints_stacks_and_ends_with_75",)),
    45: (
        "paths that lead outside, alias bomb, pickle named .safetensors",
        (
            _INPUTS + "row_45_a_pickle_named_safetensors_is_refused",
            _INPUTS + "row_45_an_index_that_leaves_the_directory_is_refused",
            _INPUTS + "row_45_a_bomb_of_yaml_aliases_is_refused",
            _PATHS,
        ),
    ),
    46: (
        "hub name without a network, missing extra",
        (
            _INPUTS + "row_46_a_hub_name_without_a_network_names_the_local_form",
            _INPUTS + "row_46_a_tracker_that_is_not_installed_is_left_out_and_the_run_goes_on",
        ),
    ),
}
