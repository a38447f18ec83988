"""What the head costs, side by side with what a user would run instead and with what cannot be beaten."""
