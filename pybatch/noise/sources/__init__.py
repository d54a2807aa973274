"""Where pairs of gradient norms come from, one file a source."""
