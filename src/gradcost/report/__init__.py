"""Plain records in, a verdict, tables, figures and one offline page out; no torch anywhere here."""
