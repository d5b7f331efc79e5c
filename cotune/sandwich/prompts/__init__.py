"""How a prompt becomes numbers that can be followed: one kind of prompt variable, one file."""
