"""Query sets, and how they become token ids."""
