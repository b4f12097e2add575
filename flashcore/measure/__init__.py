"""Clocks, cache state, statistics and the machine's record; knows nothing of attention."""
