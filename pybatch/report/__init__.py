"""Records in, something to read out. Nothing here measures or imports torch."""
