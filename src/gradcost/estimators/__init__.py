"""Ways of getting a gradient: two methods, wrappers around them, and the names that people know."""
