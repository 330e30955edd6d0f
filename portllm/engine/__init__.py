"""How it runs: Ray lives here, and only here."""
