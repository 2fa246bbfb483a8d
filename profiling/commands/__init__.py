"""The commands of `ldmperf`: options read, then handed over."""
