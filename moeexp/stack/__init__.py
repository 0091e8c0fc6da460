"""From a config to methods bound to weights and state."""
