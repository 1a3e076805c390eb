"""Memory and time, before anything runs."""
