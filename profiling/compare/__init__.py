"""Two sets of records, case by case: what changed, beside what noise explains.

`metrics` says what is compared, `sets` reads records, `contrast` has the statistics, `comparison` the verdicts,
`gate` the thresholds. `turns` runs sides that take samples in turn, `worktrees` are two commits of a repository;
`comparison_table` prints.
"""
