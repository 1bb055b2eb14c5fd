"""What a person types: flags, gin files with their macros, and the process that they start."""
