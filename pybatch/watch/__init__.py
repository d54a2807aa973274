"""A foreign training under observation: what it trains, its step, its noise, and its last pass run at other sizes."""
