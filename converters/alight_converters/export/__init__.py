"""Write a checkpoint in the format of a runtime, one format per file."""
