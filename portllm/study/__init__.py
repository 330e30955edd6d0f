"""What is asked: the study file, its recipes, keys and plan. Pure values, no I/O."""
