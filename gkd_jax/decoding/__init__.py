"""Other ways to decode than sampling: beam search, and greedy decoding with a calculator."""
