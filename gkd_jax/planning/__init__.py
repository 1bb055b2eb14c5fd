"""Measures a run on this machine, or estimates its cost on accelerators that are not here."""
