"""DUET beside other unlearning methods."""
