"""The life of a run: its jitted functions, its loop, and the record it leaves."""
