"""The data that a step reads: batches of a seqio task, and a teacher's cached scores."""
