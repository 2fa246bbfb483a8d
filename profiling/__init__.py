"""What one sample of each size costs in wall-clock time."""
