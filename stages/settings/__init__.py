"""Every setting, with one line on each."""
