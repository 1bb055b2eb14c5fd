"""Text: vocabularies and chat templates, text files, metrics of decoded texts, the calculator."""
