"""`ldmperf profile --preset pipelines`: from a prompt to an image, by diffusers' pipeline and by ours."""
