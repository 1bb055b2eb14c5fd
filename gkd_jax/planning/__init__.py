"""What a run costs: timed on this machine, or compiled for one that is not there."""
