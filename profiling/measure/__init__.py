"""What every measurement stands on."""
