"""Sweeps that survive: every group of cases is measured by a process of its own.

`group_task` says what a process does, `group_child` does it there and tells of it in `events`, `group_process`
starts it and makes a row of whatever ends it. `local` goes through a run's groups on this machine, `cluster`
through those of a Ray cluster: `on_node` is what a node does, `cluster_group` what is known of it here. `shards`
deals groups to machines that know nothing of each other.
"""
