"""What one step calls and launches."""
