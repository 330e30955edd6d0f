"""What is done: the stage functions. torch lives here; this file imports nothing."""
