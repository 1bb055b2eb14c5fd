"""Loads models from any supported checkpoint, and saves and resumes runs."""
