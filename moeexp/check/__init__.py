"""Is it the same function, and how good is the model."""
