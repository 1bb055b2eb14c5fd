"""The command line: flags, gin files with their macros, and the set-up of the process."""
