"""`ldmperf profile`: whole trajectories, measured."""
