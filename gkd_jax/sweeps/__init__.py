"""Studies of many runs: the rows of a TOML file made into commands, and these run in their order."""
