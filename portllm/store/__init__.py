"""What is known: artifacts, records, failures, result rows. No torch, no Ray."""
