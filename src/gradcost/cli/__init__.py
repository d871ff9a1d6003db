"""The command line: text to values, commands, what the person at the terminal sees."""
