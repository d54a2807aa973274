"""What everything else stands on: errors, numbers as text, JSON, batch ranges, display in a notebook, progress."""
