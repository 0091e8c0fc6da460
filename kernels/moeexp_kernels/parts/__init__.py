"""What ops are made of."""
