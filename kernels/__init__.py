"""The fused operators. Imports the standard library, torch and triton, nothing else: copy this folder anywhere."""
