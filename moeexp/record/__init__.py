"""What a run was and found, written whole; where it is sent."""
