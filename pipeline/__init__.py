"""How a run starts: reads arguments and the environment, and prints."""
