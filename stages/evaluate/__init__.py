"""Stage three: scores, verdicts, and other benchmarks' formats."""
