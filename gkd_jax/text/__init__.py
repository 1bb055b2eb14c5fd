"""What a run does with text: vocabularies, files, metrics of texts, and the calculator."""
