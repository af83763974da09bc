"""`shoal doctor`: facts of machines and of what is between them, checks over these facts, findings with a mend."""
