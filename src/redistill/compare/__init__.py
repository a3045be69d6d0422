"""Several methods, one budget, one table: `plan` (what is asked), `runs` (doing it), `table` (what came out)."""
