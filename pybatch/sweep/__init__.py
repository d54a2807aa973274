"""Many trials over batch sizes, rules and seeds: which are run next, the store that keeps them, the record."""
