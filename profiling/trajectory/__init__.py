"""`ldmperf profile`: whole trajectories, measured.

`presets` makes the cases (`case`), `runner` goes through them by `group`; a `lane` is one backend in a group.
`ours` and `theirs` are the backends, `rungs` their list. `check` compares results, `short_traces` traces.
`records` and `runs` are what is written, `progress` what is shown meanwhile.
"""
