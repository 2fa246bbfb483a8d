"""`ldmperf compile`: what a run launches, compiled before."""
