"""Decoding with a checkpoint, and scoring what was decoded."""
