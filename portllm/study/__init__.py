"""What is asked: the study file, its recipes, keys and plan. Pure values; no torch, no Ray, no I/O but the study file."""
