"""The standing benchmarks: what they run, how they are repeated, and the tables and plots they end in."""
