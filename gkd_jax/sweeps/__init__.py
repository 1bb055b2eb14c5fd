"""Studies of many runs: a TOML file of rows becomes commands, which run in their order."""
