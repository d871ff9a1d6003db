"""Published comparisons: their numbers as data, their studies, and what became of them here."""
