"""What one step calls and launches.

`recording` records the operators of a run; `calls` are ours in a step, `call` is one of them.
`recorded_steps` are whole steps, ours and diffusers'. `rules` predicts their `launches`, `groups` sorts kernels.
`flops` counts a forward.
"""
