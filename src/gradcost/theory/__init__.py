"""What is known of these methods without running them, as functions that the tests hold against runs."""
