"""Side by side with what a user would pick instead; never timed inside tests."""
