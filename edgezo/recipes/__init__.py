"""Task recipes: how the rows of known data sets are read and measured (docs/tasks.md)."""
