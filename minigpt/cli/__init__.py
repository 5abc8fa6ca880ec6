"""The command line of `minigpt`."""
