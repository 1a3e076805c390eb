"""Stage one: questions and a prefix in, a store out."""
