"""How many instructions recording takes, counted by callgrind: no clock, so no noise of a busy machine."""
