"""report.html, the other pages, and the terminal's tables."""
