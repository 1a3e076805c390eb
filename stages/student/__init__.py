"""Stage two: a store in, students out."""
